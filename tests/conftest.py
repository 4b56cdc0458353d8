"""What do all tests share? The Slurm cluster, tiny suites to sweep on it or without it, and fixtures of several files."""

import gc

import pytest
import torch
from command import finished_run
from diffusing import golden, linear
from encoding import autoencoder, images, latents, room_for_one
from fake_runs import with_figures
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
    "with_figures",
]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws must not depend on the tests before it, which are others in each of pytest's workers."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: to search these million objects for rubbish again and again took a tenth of all tests."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
