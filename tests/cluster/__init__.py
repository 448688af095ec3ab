"""A private Slurm for tests and for trying things out: `from cluster import Cluster`. See cluster.py."""

from .cluster import Cluster, Job, Process
from .machine import ClusterError

__all__ = ["Cluster", "ClusterError", "Job", "Process"]
