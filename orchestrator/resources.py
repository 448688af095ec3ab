"""Finds the data folders `config/` and `jobs/`: in the checkout first, else in the installed wheel.

How to use it
    resources.jobs_dir() / resources.find_config("local")

What it does not do
    It reads no configuration and copies nothing. Standard library only.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import ConfigError

_PACKAGE = Path(__file__).absolute().parent


def checkout() -> Path | None:
    """Root of the source tree that this package is imported from; None for an installed wheel."""
    root = _PACKAGE.parent
    is_source = (root / "pyproject.toml").is_file() and (root / "jobs").is_dir()
    return root if is_source else None


def data_root() -> Path:
    """The folder that holds `config/` and `jobs/`."""
    return checkout() or _PACKAGE / "data"


def jobs_dir() -> Path:
    """The folder of the job stubs."""
    return data_root() / "jobs"


def config_dirs() -> list[Path]:
    """Where named configurations are looked for: the project's own folder, then `./config`."""
    folders = [data_root() / "config", Path.cwd() / "config"]
    return [f for i, f in enumerate(folders) if f not in folders[:i]]


def config_names() -> list[str]:
    """Names that `--config` takes, without `base`, which is under every one of them."""
    return sorted({p.stem for folder in config_dirs() for p in folder.glob("*.yaml")} - {"base"})


def find_config(name: str, beside: Path | None = None) -> Path:
    """The file of a configuration: a path as it is, a name in the folders. Raises ConfigError.

    `beside` is the folder of a file that extends this one, searched first.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        path = beside / path if beside is not None and not path.is_absolute() else path
        if path.is_file():
            return path
        raise ConfigError([f"there is no configuration file {path}; give a path that exists, or {_names()}"])
    for folder in [*([beside] if beside else []), *config_dirs()]:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise ConfigError([f"there is no configuration {name!r}; give {_names()}, or the path of a YAML file"])


def _names() -> str:
    return "one of the names " + ", ".join(config_names())
