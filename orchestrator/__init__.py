"""The launcher: configuration, plan, schedulers and the command line. Imports no torch, vllm or fastapi."""

__version__ = "0.1.0"
