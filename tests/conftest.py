"""What do all tests share? The Slurm cluster, tiny suites to sweep on it or without it, and fixtures of several files."""

from command import finished_run
from diffusing import golden, linear
from encoding import autoencoder, images, latents, room_for_one
from leases import folder, outside_slurm
from slurm_cluster import cluster
from sweeping import tiny_suite, undisturbed_runs
from sweeps_here import no_slurm, swept, swept_once

__all__ = [
    "autoencoder",
    "cluster",
    "finished_run",
    "folder",
    "golden",
    "images",
    "latents",
    "linear",
    "no_slurm",
    "outside_slurm",
    "room_for_one",
    "swept",
    "swept_once",
    "tiny_suite",
    "undisturbed_runs",
]
