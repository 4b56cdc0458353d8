"""Are two runs the same, whatever happened to one of them on the way?"""

from pathlib import Path

import numpy as np
from training import differing, rows, saved

from bench.runs import read_run, read_samples


def assert_same_bytes(one: Path, other: Path) -> None:
    """Two done runs have the same weights, averages, optimiser's state, losses, samples and scores, to the last bit."""
    (tensors, counters), (others, other_counters) = saved(one), saved(other)
    assert not differing(tensors, others)
    assert counters == other_counters
    assert rows(one) == rows(other)
    samples, other_samples = read_samples(one), read_samples(other)
    assert samples is not None and other_samples is not None and np.array_equal(samples, other_samples)
    assert scores(one) == scores(other)


def scores(folder: Path) -> list[tuple[str, int, dict[str, float], float]]:
    """At the end, then along the curve: protocol, number of samples, metrics and held-out loss."""
    found = [*read_run(folder).evaluations, *read_run(folder).curve]
    assert found
    return [(record["protocol_hash"], record["n"], record["metrics"], record["heldout_loss"]) for record in found]


def assert_nothing_half_written(folder: Path) -> None:
    """Nor a lease that nobody holds."""
    left = [path for pattern in ("*.tmp", ".*.tmp", ".tmp*", ".lease-*", "lease/*") for path in folder.rglob(pattern)]
    assert not left
