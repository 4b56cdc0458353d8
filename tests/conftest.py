"""What do all tests share? The Slurm cluster."""

from slurm_cluster import cluster

__all__ = ["cluster"]
