"""What would a run need, before anyone pays for it? `tsbench plan`: parameters, computation, memory and device-hours.

Networks are on the meta device: nothing is allocated, so the largest take seconds too.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imports are made where they are needed, so that help and refusals come at once
    from rich.console import Group

    from bench.planning import PlannedRun
    from bench.suite import SuiteRun
    from slurm.profile import Profile

NUMBERS = (
    *("Stored (M)", "Active (M)", "GMACs/image"),
    *("Weights", "Gradients", "Moments", "EMA", "Kept", "Gathered", "GB", "Hours"),
)
AGAIN = 4 / 3  # of a step's computation, where blocks are computed again: forward, forward again, and backward as two


def add_parser(commands: Any) -> None:
    """The command, for `bench.cli`."""
    plan = commands.add_parser(
        "plan",
        help="parameters, computation, memory and device-hours of a run or a suite, without allocating it",
        description="What a configuration or a suite would need: parameters, multiply-accumulates per image, memory of a device "
        "and device-hours. Nothing is allocated and no image is read; latents need not be here, if data.image_size says how "
        "large they are.",
    )
    plan.add_argument(
        "what",
        nargs="?",
        metavar="CONFIG|SUITE",
        help="a YAML file of a run or a suite, a run folder, or a suite of bench/suites; default: the settings alone",
    )
    plan.add_argument("settings", nargs="*", metavar="key=value", help="for example model.size=G/2 system.shard=full")
    plan.add_argument("--devices", type=int, help="that one run trains on (default: those of the profile)")
    plan.add_argument("--profile", default="h100", help="a file of slurm/clusters, or a path: its speed (default h100)")
    plan.set_defaults(run=run_plan)


def run_plan(parsed: argparse.Namespace) -> int:
    from rich.console import Console

    from slurm.profile import load_profile

    profile = load_profile(parsed.profile)
    num_devices = profile.world_size if parsed.devices is None else parsed.devices
    if num_devices < 1:
        raise ValueError(f"--devices is {num_devices}: give at least 1")
    planned = plan_of(parsed.what, parsed.settings, num_devices, profile.device)
    Console(width=None if Console().is_terminal else 160).print(plan_table(planned, profile, num_devices))
    return 0


def plan_of(what: str | None, settings: Sequence[str], num_devices: int, device: str = "cpu") -> list["PlannedRun"]:
    """Each run once, whatever suites say of groups, on `device`. ValueError in one sentence for what is not possible."""
    from bench.planning import plan_runs

    if what is not None and "=" in what:
        settings, what = [what, *settings], None
    runs = {run.config.run_id: run for run in runs_of(what, [*settings, f"system.device={device}"])}
    alone = [replace(run, group=run_id) for run_id, run in runs.items()]  # their budgets need not be equal to look at them
    return plan_runs(alone, num_devices, only_look=True)


def runs_of(what: str | None, settings: list[str]) -> list["SuiteRun"]:
    """A suite's runs, or the one of a file, a run folder, or of settings alone."""
    from bench.files import read_yaml
    from bench.job import make_config, read_config
    from bench.suite import SuiteRun, load_suite, suite_runs

    if what is not None and Path(what).is_dir():
        return [SuiteRun(read_config(Path(what), settings), {}, "")]
    tree = read_yaml(Path(what)) if what is not None and Path(what).is_file() else {}
    if what is None or (tree and not {"methods", "groups"} & tree.keys()):
        return [SuiteRun(make_config(tree, settings), {}, "")]
    return suite_runs(load_suite(what), settings, make_config)


def device_hours(planned: "PlannedRun", teraflops: float) -> float:
    """Of all devices together: what is computed again takes time, though a budget does not count it."""
    timed = planned.config.budget.unit == "device_seconds"
    return planned.device_hours(teraflops) * (AGAIN if planned.config.system.recompute and not timed else 1)


def plan_table(planned: Sequence["PlannedRun"], profile: "Profile", num_devices: int) -> "Group":
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("Run", overflow="fold")
    for name in NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for each in planned:
        memory = each.memory
        parts = (memory.weights, memory.gradients, memory.moments, memory.averages, memory.activations, memory.gathered)
        table.add_row(
            escape(each.label),
            *(_number(count / 1e6) for count in (each.stored_parameters, each.active_parameters)),
            _number(each.forward_macs_per_image / 1e9),
            *(_number(size / 1e9) for size in (*parts, memory.total)),
            _number(device_hours(each, profile.teraflops)),
        )
    return Group(table, *(Text(note, "dim") for note in notes(planned, profile, num_devices)))


def notes(planned: Sequence["PlannedRun"], profile: "Profile", num_devices: int) -> list[str]:
    """What the numbers stand for."""
    from bench.sweep_views import count_of

    found = [
        f"GB of each of {count_of(num_devices, 'device')}, 4 bytes a number: weights, gradients, AdamW's moments, averages, what "
        "a micro-batch keeps for its backward pass (in bf16 copies of weights too, and activations are less than told), what is "
        "gathered of a sharded run, and their sum.",
        f"Device-hours of all devices at {profile.teraflops:g} TFLOP/s each, an assumption of profile {profile.name}.",
    ]
    if any(each.config.system.recompute for each in planned):
        found.append("With system.recompute the hours hold a third more computation, which a budget does not count.")
    if sharded := [each for each in planned if each.config.system.shard == "full"]:
        most = 4 * max(each.stored_parameters for each in sharded)
        found.append(f"Sampling and scoring take a whole network: up to {_number(most / 1e9)} GB on each device.")
    if missing := sorted({path for each in planned for path in each.missing}):
        found.append(f"To run, these are still missing: {', '.join(missing)}.")
    return found


def _number(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 1 else f"{value:.1f}"
