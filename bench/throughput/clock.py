"""How are several things timed side by side, so that their ratio holds although the machine's speed drifts?

In turns, A B C A B C ...: each round gives one time of each, and a ratio is taken within a round. What is reported is
the median over rounds with the quartiles.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]
Part = Callable[[str, int, torch.device], tuple[Call, Call]]
"""A size ("S/2"), a batch size and a device -> two calls that compute the same: ours, and that in plain code."""
MOST_CALLS = 100  # in one turn
WORDS_OF_MEMORY = ("can't allocate", "CUDA error: out of memory", "ALLOC_FAILED")  # of the host, the driver, and CUDA's libraries


class Spread(NamedTuple):
    """Of the values of all rounds."""

    median: float
    low: float  # the lower quartile
    high: float  # the upper quartile


def spread_of(values: Sequence[float]) -> Spread:
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return Spread(float(median), float(low), float(high))


def speed_ratio(own: Sequence[float], baseline: Sequence[float]) -> Spread:
    """How many times as fast as the baseline: of the seconds of each round."""
    return spread_of([other / seconds for seconds, other in zip(own, baseline, strict=True)])


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all that it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def calls_per_turn(run: Call, wait: Callable[[], None], least_seconds: float) -> int:
    """How often to call in one turn, so that it lasts long enough to be timed; on a GPU, launches then overlap as in training."""
    seconds = time_turn(run, wait, 1)
    return max(1, min(MOST_CALLS, round(least_seconds / max(seconds, 1e-9))))


def time_turn(run: Call, wait: Callable[[], None], num_calls: int) -> float:
    """Seconds of one call, over `num_calls` in a row."""
    wait()
    started = time.perf_counter()
    for _ in range(num_calls):
        run()
    wait()
    return (time.perf_counter() - started) / num_calls


def time_in_turns(
    runs: Mapping[Key, Call],
    repeats: int,
    wait: Callable[[], None],
    least_seconds: float = 0.0,
    rest: Callable[[Key], object] = lambda key: None,
    opening: bool = False,
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Seconds of one call of each, round by round; and why one was left out: it ran out of memory. All are warm already.

    `rest` frees, after each turn, what one needs in its own turns only. `opening`: a turn begins with a call that is not timed,
    in which a GPU's allocator trades the blocks of the one before for those of this one.
    """
    calls, seconds, failed = dict.fromkeys(runs, 1), {key: [] for key in runs}, {}  # type: ignore[var-annotated]
    for repeat in range(-1, repeats):  # the first round only finds out how many calls make a turn
        for key in [key for key in runs if key not in failed]:
            try:
                if opening:
                    runs[key]()
                if repeat < 0:
                    calls[key] = calls_per_turn(runs[key], wait, least_seconds)
                else:
                    seconds[key].append(time_turn(runs[key], wait, calls[key]))
            except (MemoryError, RuntimeError) as error:
                failed[key] = why_out_of_memory(error)
                del seconds[key]
            rest(key)
    return seconds, failed


def why_out_of_memory(error: Exception) -> str:
    """One line; any other error is raised again. PyTorch has a class of its own for accelerators alone."""
    said = any(words in str(error) for words in WORDS_OF_MEMORY)
    if not (said or isinstance(error, MemoryError | torch.OutOfMemoryError)):
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return f"out of memory: {(str(error).splitlines() or [type(error).__name__])[0]}"
