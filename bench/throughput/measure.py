"""How fast is each contestant? Builds those of one size side by side, times them in turns and makes a row of each.

A row says what was timed, the seconds of one step (median and quartiles over rounds), images/s, the part of the
device's peak that useful arithmetic reaches, peak memory, and how many times as fast as each baseline it is. Useful are
2 FLOPs for each multiply-accumulate of a forward pass and 6 for a training step (arXiv 2204.02311, appendix B), of the
method as it is defined: what plain code or recomputation does on top does not count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.provenance import device_name
from bench.throughput.clock import Spread, speed_ratio, spread_of, synchroniser, time_in_turns, why_out_of_memory
from bench.throughput.contest import NUM_SAMPLING_STEPS, Contestant, Group, Setup, baseline_of, groups_of
from bench.throughput.entrant import Entrant, Need, Plain, need_of
from bench.throughput.peak import measure_peak, vendor_peak

TRAINING, SAMPLING = "training step", "sampling step"
Row = dict[str, Any]
Needs = dict[tuple[str, str, int], Need]  # of a method at a size and a batch size


@dataclass(frozen=True)
class Task:
    """How to time, for all contestants. `watch` is told what is going on; `look` sees every entrant after it was timed."""

    setup: Setup
    plain: Plain
    against: Sequence[str] = ()
    repeats: int = 7
    least_seconds: float = 0.0
    together: bool = False  # all of one size and batch size; else each method with its baselines, which takes less memory
    watch: Callable[[str], None] = lambda what: None
    look: Callable[[Entrant], None] = lambda entrant: None


def measure_all(chosen: Sequence[Contestant], task: Task) -> list[Row]:
    """Two rows of each contestant and of each baseline. ValueError, before anything is timed, for what is not allowed."""
    groups = groups_of(chosen, task.against, task.together)
    needs: Needs = {}
    for contestant in (contestant for group in groups for contestant in group.contestants):
        key = (contestant.method, contestant.size, contestant.batch_size)
        if key not in needs:
            task.watch(f"counting the FLOPs of {contestant.method} {contestant.size}")
            needs[key] = need_of(contestant, task.setup)
    return [row for group in groups for row in _measure_group(group, task, needs)]


def _measure_group(group: Group, task: Task, needs: Needs) -> list[Row]:
    setup, device = task.setup, torch.device(task.setup.device)
    torch.set_num_threads(setup.threads)
    torch.compiler.reset()  # what was compiled for earlier sizes would count towards the limit on recompiling
    precisions = {contestant.precision for contestant in group.contestants}
    peaks = {precision: measure_peak(device, precision) for precision in precisions}
    entrants: dict[Contestant, Entrant] = {}
    notes: dict[Contestant, str] = {}
    for contestant in group.contestants:
        task.watch(f"warming up {contestant.label}")
        try:
            entrants[contestant] = Entrant(contestant, setup, _need(needs, contestant), task.plain)
        except (MemoryError, RuntimeError) as error:
            notes[contestant] = f"{why_out_of_memory(error)} (beside {len(entrants)} others)"
    seconds: dict[str, dict[Contestant, list[float]]] = {}
    for what, runs in (
        (TRAINING, {contestant: entrant.train for contestant, entrant in entrants.items()}),
        (SAMPLING, {contestant: entrant.sample for contestant, entrant in entrants.items()}),
    ):
        task.watch(f"timing the {what} of {len(runs)} contestants in turns")
        seconds[what], failed = time_in_turns(runs, task.repeats, synchroniser(device), task.least_seconds)
        notes |= failed
        for each in entrants.values():
            each.settle()
    for precision in precisions:  # the machine may have been slower before
        peaks[precision] = max(peaks[precision], measure_peak(device, precision))
    for each in entrants.values():
        task.look(each)
    rows = []
    for contestant in group.contestants:
        need, entrant, note = _need(needs, contestant), entrants.get(contestant), notes.get(contestant, "")
        for what, of_all in seconds.items():
            row = {"what": what, **_facts(contestant), "beside": group.beside, "note": note}
            row |= _speed(contestant, what, of_all, task, need, peaks[contestant.precision])
            if entrant is not None and what == TRAINING:
                row |= {"peak_memory_bytes": entrant.peak_memory_bytes, "memory": entrant.memory_kind}
            rows.append(row)
    return rows


def _need(needs: Needs, contestant: Contestant) -> Need:
    return needs[contestant.method, contestant.size, contestant.batch_size]


def _facts(contestant: Contestant) -> Row:
    return {
        "method": contestant.method,
        "code": "naive" if contestant.plain else "ours",
        "size": contestant.size,
        "batch_size": contestant.batch_size,
        "precision": contestant.precision,
        "compile": contestant.compiled,
    }


def _speed(
    contestant: Contestant, what: str, seconds: Mapping[Contestant, list[float]], task: Task, need: Need, peak: float
) -> Row:
    """What follows from the seconds of one thing that was timed."""
    own = seconds.get(contestant, [])
    row: Row = {"rounds": len(own), **spread_columns("step_seconds", spread_of(own) if own else None)}
    if own:
        row |= _rates(contestant, what, spread_of(own).median, task.setup, need.cost.forward_macs_per_image, peak)
    for name in task.against:
        baseline = baseline_of(contestant, name)
        other = seconds.get(baseline) if baseline else None
        row |= spread_columns(f"speed_over_{name}", speed_ratio(own, other) if own and other else None)
    return row


def _rates(contestant: Contestant, what: str, step_seconds: float, setup: Setup, macs: float, peak: float) -> Row:
    """Of a median step; `macs` of one image's forward pass, `peak` in FLOP/s."""
    trains, scale = what == TRAINING, setup.guidance_scale
    flops_per_image = 6 * macs if trains else 2 * macs * (1 if scale == 1 else 2)
    flops_per_second = contestant.batch_size * flops_per_image / step_seconds
    vendor = vendor_peak(device_name(setup.device), contestant.precision)
    return {
        "guidance_scale": None if trains else scale,
        "images_per_second": contestant.batch_size / step_seconds / (1 if trains else NUM_SAMPLING_STEPS),
        "forward_macs_per_image": macs,
        "flops_per_second": flops_per_second,
        "mfu": flops_per_second / peak,
        "mfu_of_vendor_peak": flops_per_second / vendor if vendor else None,
        "peak_flops_per_second": peak,
        "vendor_flops_per_second": vendor,
    }


def spread_columns(name: str, spread: Spread | None) -> Row:
    """A median and its quartiles."""
    median, low, high = spread or (None, None, None)
    return {name: median, f"{name}_low": low, f"{name}_high": high}
