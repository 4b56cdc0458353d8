"""How fast is each contestant? Builds those that fit into memory side by side, times them in turns and makes a row of each.

A row says what was timed, the seconds of one step (median and quartiles over rounds), images/s, the part of the
device's peak that useful arithmetic reaches, peak memory, and how many times as fast as each baseline it is. Useful are
2 FLOPs for each multiply-accumulate of a forward pass and 6 for a training step (arXiv 2204.02311, appendix B), of the
method as it is defined: what plain code or recomputation does on top does not count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.provenance import device_name
from bench.throughput.clock import Spread, speed_ratio, spread_of, synchroniser, time_in_turns, why_out_of_memory
from bench.throughput.contest import NUM_SAMPLING_STEPS, Contestant, Group, Setup, baseline_of, groups_of
from bench.throughput.entrant import Count, Entrant, Plain, count_of
from bench.throughput.memory import free_bytes
from bench.throughput.peak import measure_peak, vendor_peak
from bench.throughput.pieces import SHARE_USED, bytes_together, pieces

TRAINING, SAMPLING = "training step", "sampling step"
Row = dict[str, Any]
Counts = dict[tuple[str, str, int], Count]  # of a method at a size and a batch size


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


@dataclass
class Timed:
    """What came out for contestants that were in memory at the same time."""

    contestants: Sequence[Contestant]
    peaks: dict[str, float] = field(default_factory=dict)  # of the device in each precision, in FLOP/s
    seconds: dict[str, dict[Contestant, list[float]]] = field(default_factory=dict)  # of each thing that was timed, by round
    memory: dict[Contestant, Row] = field(default_factory=dict)
    notes: dict[Contestant, str] = field(default_factory=dict)  # why one could not be timed


def measure_all(chosen: Sequence[Contestant], task: Task) -> Iterator[list[Row]]:
    """Two rows of each contestant and of each baseline, group by group. ValueError, before anything is timed, for what is not
    allowed.
    """
    groups = groups_of(chosen, task.against, task.together)
    counts: Counts = {}
    for contestant in (contestant for group in groups for contestant in group.contestants):
        key = (contestant.method, contestant.size, contestant.batch_size)
        if key not in counts:
            task.watch(f"counting the FLOPs of {contestant.method} {contestant.size}")
            counts[key] = count_of(contestant, task.setup)
    for group in groups:
        yield _measure_group(group, task, counts)


def _measure_group(group: Group, task: Task, counts: Counts) -> list[Row]:
    """In as few pieces as fit into memory."""
    needs = {contestant: _count(counts, contestant).need for contestant in group.contestants}
    free = free_bytes(torch.device(task.setup.device))
    cut = pieces(group.contestants, task.against, needs.__getitem__, free)
    why = ""
    if len(cut) > 1:
        why = f"all together need about {bytes_together(needs.values()) / 1e9:.1f} GB, and of {free / 1e9:.1f} GB that are free "
        why += f"{SHARE_USED * free / 1e9:.1f} are used at most"
        task.watch(f"timing {len(group.contestants)} contestants in {len(cut)} pieces: {why}")
    timed = [_time_together(piece, task, counts) for piece in cut]
    return [row for contestant in group.contestants for row in _rows(contestant, group, timed, task, counts, why)]


def _time_together(contestants: Sequence[Contestant], task: Task, counts: Counts) -> Timed:
    setup, device, timed = task.setup, torch.device(task.setup.device), Timed(contestants)
    torch.set_num_threads(setup.threads)
    torch.compiler.reset()  # what was compiled for earlier sizes would count towards the limit on recompiling
    precisions = {contestant.precision for contestant in contestants}
    timed.peaks = {precision: measure_peak(device, precision) for precision in precisions}
    entrants: dict[Contestant, Entrant] = {}
    for contestant in contestants:
        task.watch(f"warming up {contestant.label}")
        try:
            entrants[contestant] = Entrant(contestant, setup, _count(counts, contestant), task.plain)
        except (MemoryError, RuntimeError) as error:
            timed.notes[contestant] = f"{why_out_of_memory(error)} (beside {len(entrants)} others)"
    for what, runs in (
        (TRAINING, {contestant: entrant.train for contestant, entrant in entrants.items()}),
        (SAMPLING, {contestant: entrant.sample for contestant, entrant in entrants.items()}),
    ):
        task.watch(f"timing the {what} of {len(runs)} contestants in turns")
        wait = synchroniser(device)
        timed.seconds[what], failed = time_in_turns(
            runs, task.repeats, wait, task.least_seconds, lambda contestant: entrants[contestant].rest()
        )
        timed.notes |= failed
        for each in entrants.values():
            each.settle()
    for precision in precisions:  # the machine may have been slower before
        timed.peaks[precision] = max(timed.peaks[precision], measure_peak(device, precision))
    for contestant, entrant in entrants.items():
        task.look(entrant)
        timed.memory[contestant] = {"peak_memory_bytes": entrant.peak_memory_bytes, "memory": entrant.memory_kind}
    return timed


def _rows(contestant: Contestant, group: Group, timed: Sequence[Timed], task: Task, counts: Counts, why: str) -> list[Row]:
    """Of one contestant, from all pieces that it was in: times are those of the first in which it had no trouble, each ratio is
    taken within one. `why` a group was cut, if it was.
    """
    timed = sorted((piece for piece in timed if contestant in piece.contestants), key=lambda piece: contestant in piece.notes)
    own, rows = timed[0], []
    for what in (TRAINING, SAMPLING):
        row = {"what": what, **_facts(contestant), "beside": group.beside, "note": own.notes.get(contestant, "")}
        seconds = own.seconds[what].get(contestant, [])
        row |= {"rounds": len(seconds), **spread_columns("step_seconds", spread_of(seconds) if seconds else None)}
        if seconds:
            macs = _count(counts, contestant).cost.forward_macs_per_image
            row |= _rates(contestant, what, spread_of(seconds).median, task.setup, macs, own.peaks[contestant.precision])
        ratios = _ratios(contestant, what, group, timed, task)
        if why and not row["note"]:
            row["note"] = _note_on_pieces(len(timed), [name for name, ratio in ratios.items() if ratio is None], why)
        for name in task.against:
            row |= spread_columns(f"speed_over_{name}", ratios.get(name))
        if what == TRAINING:
            row |= own.memory.get(contestant, {})
        rows.append(row)
    return rows


def _ratios(contestant: Contestant, what: str, group: Group, timed: Sequence[Timed], task: Task) -> dict[str, Spread | None]:
    """Over each baseline in the group; None where the two were not timed in the same rounds."""
    ratios: dict[str, Spread | None] = {}
    for name in task.against:
        baseline = baseline_of(contestant, name)
        if baseline and baseline in group.contestants:
            both = next((piece.seconds[what] for piece in timed if {contestant, baseline} <= piece.seconds[what].keys()), None)
            ratios[name] = speed_ratio(both[contestant], both[baseline]) if both else None
    return ratios


def _note_on_pieces(num_pieces: int, without: Sequence[str], why: str) -> str:
    """What a reader of the row has to know of a group that did not fit; empty if nothing."""
    parts = [f"not timed beside {', '.join(without)}"] * bool(without)
    parts += [f"timed in {num_pieces} pieces, with the seconds of the first"] * (num_pieces > 1)
    return f"{'; '.join(parts)}: {why}" if parts else ""


def _count(counts: Counts, contestant: Contestant) -> Count:
    return counts[contestant.method, contestant.size, contestant.batch_size]


def _facts(contestant: Contestant) -> Row:
    return {
        "method": contestant.method,
        "code": "naive" if contestant.plain else "ours",
        "size": contestant.size,
        "batch_size": contestant.batch_size,
        "precision": contestant.precision,
        "compile": contestant.compiled,
    }


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
