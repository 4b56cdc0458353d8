"""How fast is a part alone, beside the same in plain code?

Those of the methods are handed in; the loaders are in `bench.throughput.loaders`. On a CPU both have memory as training has it
(switch `memory`): plain code, whose large tensors then cost no page faults, gains more by that than ours.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch

from bench.allocator import keep_freed_memory
from bench.throughput.clock import Call, Part, speed_ratio, spread_of, synchroniser, time_in_turns, why_out_of_memory
from bench.throughput.contest import PLAIN, Setup
from bench.throughput.loaders import LOADERS
from bench.throughput.rows import Row, spread_columns


def measure_parts(
    parts: Mapping[str, Part],
    sizes: Sequence[str],
    batches: Sequence[int],
    precisions: Sequence[str],
    setup: Setup,
    repeats: int,
    least_seconds: float,
    watch: Callable[[str], None] = lambda what: None,
) -> Iterator[list[Row]]:
    """Two rows of each part: ours, with how many times as fast it is as the plain one, and the plain one."""
    torch.set_num_threads(setup.threads)
    if torch.device(setup.device).type == "cpu":
        keep_freed_memory(True)
    with tempfile.TemporaryDirectory() as folder:
        known = {**parts, **{name: make_loader(Path(folder)) for name, make_loader in LOADERS.items()}}
        for (name, make), size, batch_size, precision in product(known.items(), sizes, batches, precisions):
            if name in LOADERS and (size, precision) != (sizes[0], precisions[0]):
                continue  # they depend on neither
            watch(f"timing {name}, {size}, batch {batch_size}, {precision}")
            yield _measure(name, make, size, batch_size, precision, setup, repeats, least_seconds)


def _measure(
    name: str, make: Part, size: str, batch_size: int, precision: str, setup: Setup, repeats: int, least_seconds: float
) -> list[Row]:
    device, note = torch.device(setup.device), ""
    seconds: dict[str, list[float]] = {}
    try:
        calls = dict(zip(("ours", PLAIN), make(size, batch_size, device), strict=True))
        runs = {code: _under(call, device, precision) for code, call in calls.items()}
        for run in runs.values():
            run()
        seconds, failed = time_in_turns(runs, repeats, synchroniser(device), least_seconds)
        note = "; ".join(failed.values())
    except (MemoryError, RuntimeError) as error:
        note = why_out_of_memory(error)
    rows = []
    for code in ("ours", PLAIN):
        own = seconds.get(code)
        facts = {"what": name, "method": "", "code": code, "size": size, "batch_size": batch_size, "precision": precision}
        row: Row = {**facts, "compile": "none", "beside": "", "rounds": len(own or ()), "note": note}
        row |= spread_columns("step_seconds", spread_of(own) if own else None)
        both = code == "ours" and len(seconds) == 2
        row |= spread_columns(f"speed_over_{PLAIN}", speed_ratio(seconds["ours"], seconds[PLAIN]) if both else None)
        rows.append(row)
    return rows


def _under(call: Call, device: torch.device, precision: str) -> Call:
    """The call under the precision that training would give it."""

    def run() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            call()

    return run
