"""What do all tests share? The Slurm cluster, and tiny suites to sweep on it or without it."""

from slurm_cluster import cluster
from sweeping import tiny_suite, undisturbed_runs
from sweeps_here import no_slurm, swept, swept_once

__all__ = ["cluster", "no_slurm", "swept", "swept_once", "tiny_suite", "undisturbed_runs"]
