"""Faults, injected into whole runs on a real Slurm: each test is one row of docs/reliability.md."""
