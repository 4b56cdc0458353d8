"""What does a row say of a contestant that was timed?

What was timed, the seconds of one step (median and quartiles over rounds), images/s, the part of the device's peak that
useful arithmetic reaches, peak memory, and how many times as fast as each baseline it is. Useful are 2 FLOPs for each
multiply-accumulate of a forward pass and 6 for a training step (arXiv 2204.02311, appendix B), of the method as it is
defined: what plain code or recomputation does on top does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.flops import Cost
from bench.provenance import device_name
from bench.throughput.clock import Spread, speed_ratio, spread_of
from bench.throughput.contest import NUM_SAMPLING_STEPS, Contestant, Group, Setup, baseline_of
from bench.throughput.peak import vendor_peak

TRAINING, SAMPLING = "training step", "sampling step"
FASTER = "an MFU above 100%: the machine was faster here than when its peak was measured"
Row = dict[str, Any]


@dataclass
class Timed:
    """What came out for contestants that were in memory at the same time."""

    contestants: Sequence[Contestant]
    peaks: dict[str, float] = field(default_factory=dict)  # of the device in each precision, in FLOP/s
    seconds: dict[str, dict[Contestant, list[float]]] = field(default_factory=dict)  # of each thing that was timed, by round
    notes: dict[str, dict[Contestant, str]] = field(default_factory=dict)  # of each thing, why it could not be timed
    memory: dict[Contestant, Row] = field(default_factory=dict)


def rows_of(
    contestant: Contestant, group: Group, timed: Sequence[Timed], cost: Cost, setup: Setup, against: Sequence[str], why: str
) -> list[Row]:
    """One of each thing, from all pieces that it was in: times are those of the first in which it had no trouble, each ratio is
    taken within one. `why` a group was cut, if it was.
    """
    timed, rows = [piece for piece in timed if contestant in piece.contestants], []
    for what in (TRAINING, SAMPLING):
        own = next((piece for piece in timed if contestant not in piece.notes[what]), timed[0])
        row = {"what": what, **_facts(contestant), "beside": group.beside, "note": own.notes[what].get(contestant, "")}
        seconds = own.seconds[what].get(contestant, [])
        row |= {"rounds": len(seconds), **spread_columns("step_seconds", spread_of(seconds) if seconds else None)}
        if seconds:
            macs = cost.forward_macs_per_image
            row |= _rates(contestant, what, spread_of(seconds).median, setup, macs, own.peaks[contestant.precision])
        ratios = _ratios(contestant, what, group, timed, against)
        if why and not row["note"]:
            row["note"] = _note_on_pieces(len(timed), [name for name, ratio in ratios.items() if ratio is None], why)
        if row.get("mfu", 0.0) > 1:
            row["note"] = "; ".join(filter(None, (row["note"], FASTER)))
        for name in against:
            row |= spread_columns(f"speed_over_{name}", ratios.get(name))
        if what == TRAINING:
            row |= own.memory.get(contestant, {})
        rows.append(row)
    return rows


def _ratios(
    contestant: Contestant, what: str, group: Group, timed: Sequence[Timed], against: Sequence[str]
) -> dict[str, Spread | None]:
    """Over each baseline in the group; None where the two were not timed in the same rounds."""
    ratios: dict[str, Spread | None] = {}
    for name in against:
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
        "sampling_steps": None if trains else NUM_SAMPLING_STEPS,  # of an image: images/s are of all of them
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
