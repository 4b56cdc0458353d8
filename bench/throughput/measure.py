"""How is each contestant timed? Beside its baselines if they fit into memory together, all that do in turns."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.throughput.clock import synchroniser, time_in_turns, why_out_of_memory
from bench.throughput.contest import Contestant, Group, Setup, groups_of
from bench.throughput.count import Count, count_of
from bench.throughput.entrant import Entrant, Plain
from bench.throughput.free import free_bytes
from bench.throughput.peak import measure_peak
from bench.throughput.pieces import SHARE_USED, bytes_together, pieces
from bench.throughput.rows import SAMPLING, TRAINING, Row, Timed, rows_of

Counts = dict[Contestant, Count]


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


def measure_all(chosen: Sequence[Contestant], task: Task) -> Iterator[list[Row]]:
    """Two rows of each contestant and of each baseline, group by group. ValueError, before anything is timed, for what is not
    allowed.
    """
    groups = groups_of(chosen, task.against, task.together)
    counts: Counts = {}
    for contestant in (contestant for group in groups for contestant in group.contestants):
        if contestant not in counts:
            task.watch(f"counting FLOPs and memory of {contestant.label}")
            counts[contestant] = count_of(contestant, task.setup)
    for group in groups:
        yield _measure_group(group, task, counts)


def _measure_group(group: Group, task: Task, counts: Counts) -> list[Row]:
    """In as few pieces as fit into memory."""
    needs = {contestant: counts[contestant].need for contestant in group.contestants}
    free = free_bytes(torch.device(task.setup.device))
    cut = pieces(group.contestants, task.against, needs.__getitem__, free)
    why = ""
    if len(cut) > 1:
        why = f"all together need about {bytes_together(needs.values()) / 1e9:.1f} GB, and of {free / 1e9:.1f} GB that are free "
        why += f"{SHARE_USED * free / 1e9:.1f} are used at most"
        task.watch(f"timing {len(group.contestants)} contestants in {len(cut)} pieces: {why}")
    timed = [_time_together(piece, task, counts) for piece in cut]
    return [
        row
        for contestant in group.contestants
        for row in rows_of(contestant, group, timed, counts[contestant].cost, task.setup, task.against, why)
    ]


def _time_together(contestants: Sequence[Contestant], task: Task, counts: Counts) -> Timed:
    device, timed = torch.device(task.setup.device), Timed(contestants)
    torch.set_num_threads(task.setup.threads)
    torch.compiler.reset()  # what was compiled for earlier sizes would count towards the limit on recompiling
    precisions = {contestant.precision for contestant in contestants}
    timed.peaks = {precision: measure_peak(device, precision) for precision in precisions}
    _time_entrants(timed, task, counts)
    gc.collect()  # a GPU that they have filled has room for the matrices again
    for precision in precisions:  # the machine may have been slower before
        timed.peaks[precision] = max(timed.peaks[precision], measure_peak(device, precision))
    return timed


def _time_entrants(timed: Timed, task: Task, counts: Counts) -> None:
    """All but the peaks; nothing of the contestants is left afterwards."""
    device = torch.device(task.setup.device)
    wait, on_gpu = synchroniser(device), device.type == "cuda"
    entrants, refused = _build(timed.contestants, task, counts)
    for what, runs in (
        (TRAINING, {contestant: entrant.train for contestant, entrant in entrants.items()}),
        (SAMPLING, {contestant: entrant.sample for contestant, entrant in entrants.items()}),
    ):
        task.watch(f"timing the {what} of {len(runs)} contestants in turns")
        timed.seconds[what], failed = time_in_turns(
            runs, task.repeats, wait, task.least_seconds, lambda contestant: entrants[contestant].rest(), opening=on_gpu
        )
        timed.notes[what] = refused | failed
        for each in entrants.values():
            each.settle()
    for contestant, entrant in entrants.items():
        timed.memory[contestant] = {"peak_memory_bytes": entrant.peak_memory_bytes, "memory": entrant.memory_kind}
        try:
            task.look(entrant)
        except (MemoryError, RuntimeError) as error:  # which takes none of the times
            task.watch(f"not looked at {contestant.label}: {why_out_of_memory(error)}")
        entrant.rest()


def _build(
    contestants: Sequence[Contestant], task: Task, counts: Counts
) -> tuple[dict[Contestant, Entrant], dict[Contestant, str]]:
    """Those that fit, and why the others do not. What a CPU seems to have no room for is not tried: the system would end the
    process, where a GPU refuses.
    """
    entrants: dict[Contestant, Entrant] = {}
    refused: dict[Contestant, str] = {}
    for contestant in contestants:
        need, free = counts[contestant].need.peak, free_bytes(torch.device(task.setup.device))
        if need > free:
            refused[contestant] = f"not tried: needs about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        else:
            task.watch(f"warming up {contestant.label}")
            try:
                entrants[contestant] = Entrant(contestant, task.setup, counts[contestant].cost, task.plain)
            except (MemoryError, RuntimeError) as error:
                refused[contestant] = why_out_of_memory(error)
        if contestant in refused and entrants:
            refused[contestant] += f" (beside {len(entrants)} others)"
    gc.collect()  # what was built of one that ran out of memory, and refers to itself
    return entrants, refused
