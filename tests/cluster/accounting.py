"""Accounting for a test cluster: slurmdbd and the MariaDB below it, so that sacct and sacctmgr answer.

How to use it: Cluster(accounting=True). COMMANDS run on host ctl before slurmctld; the database lives in the
cluster's directory and listens on a socket that only root of this cluster can reach.

What it does not do: no limits are enforced (AccountingStorageEnforce stays off), nothing is kept.
"""

from __future__ import annotations

from .config import CONTROL, USER, Layout

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb")
ACCOUNT = "lab"
SETTINGS: dict[str, str | int] = {
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "AccountingStorageHost": "ctl",
    "AccountingStoreFlags": "job_comment",
    "JobAcctGatherType": "jobacct_gather/linux",
}
SOCKETS = "/run/mysqld"  # where the client library looks, below the cluster's own /run


def slurmdbd_conf(layout: Layout) -> str:
    values = {
        "DbdHost": "ctl",
        "DbdAddr": CONTROL,
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": "root",
        "LogFile": layout.log / "slurmdbd",
        "PidFile": layout.pids / "slurmdbd",
    }
    return "".join(f"{name}={value}\n" for name, value in values.items())


def commands(layout: Layout) -> list[list[str]]:
    """In order, each returns when its part answers."""
    data, log = layout.state / "database", layout.log / "mariadb"
    server = (
        f"mariadbd --no-defaults --user=root --datadir={data} --socket={SOCKETS}/mysqld.sock "
        "--skip-networking "
        "--innodb-flush-log-at-trx-commit=0 --innodb-doublewrite=0 --innodb-buffer-pool-size=64M"
    )
    return [
        ["mkdir", "-m", "700", SOCKETS],
        ["sh", "-c", f"mariadb-install-db --no-defaults --datadir={data} --user=root --skip-test-db "
                     f"--auth-root-authentication-method=socket --skip-name-resolve >{log} 2>&1"],
        ["sh", "-c", f"{server} >>{log} 2>&1 & {_until('mariadb --no-defaults -e status')}"],
        ["slurmdbd"],
        ["sh", "-c", _until("sacctmgr -n list cluster")],
        ["sacctmgr", "-i", "add", "cluster", "test"],
        ["sacctmgr", "-i", "add", "account", ACCOUNT, "cluster=test"],
        ["sacctmgr", "-i", "add", "user", USER, f"account={ACCOUNT}", "cluster=test"],
    ]  # fmt: skip


def _until(command: str) -> str:
    """At most 200 tries of a tenth of a second; the last one's complaint goes to the holder's log."""
    return f"for _ in $(seq 200); do {command} >/dev/null 2>&1 && exit; sleep 0.1; done; {command} >&2"
