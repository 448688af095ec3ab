"""A private Slurm for tests and for trying things out: `from cluster import Cluster`. See cluster.py."""

from .cluster import Cluster, ClusterError, Job, Process

__all__ = ["Cluster", "ClusterError", "Job", "Process"]
