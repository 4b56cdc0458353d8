"""What does `tsbench throughput` do?

It times every chosen method at every size, batch size and precision, each beside its baselines in the same run, prints
a table and, with --out, writes a CSV and bars beside it, anew after each group: what ends the command early takes nothing
of what was done. Times are measured, never tested: another machine gives others.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:  # imports are made where they are needed, so that help and refusals come at once
    import pandas as pd

    from bench.throughput.clock import Part
    from bench.throughput.contest import Setup
    from bench.throughput.entrant import Plain
    from bench.throughput.rows import Row

WIDTH = 140  # of what is not printed to a terminal
EPILOG = """examples:
  tsbench throughput --size S/2 --batch 64 --threads 4 --out results/throughput/cpu.csv
  tsbench throughput --methods METHOD:experts=8,top_k=2 OTHER --against naive fp32 OTHER --precision fp32 bf16
  tsbench throughput --device cuda --size S/2 XL/2 --batch 128 --precision bf16 --compile --guidance 1
  tsbench throughput --parts --size S/2 --batch 16
"""


def add_parser(commands: Any, run: Any) -> None:
    """The command, for `bench.cli`."""
    text = "time training and sampling steps, beside plain code in the same run"
    command = commands.add_parser(
        "throughput",
        help=text,
        description=f"{text[0].upper()}{text[1:]}: median and quartiles over rounds in turns, images/s, MFU, peak memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--methods", nargs="+", default=[], metavar="NAME[:OPTION=VALUE,...]", help="which methods (default all, as they are)"
    )
    command.add_argument(
        "--size", nargs="+", default=["S/2"], help="of the backbone: S/2, XL/2 ..., or DEPTHxWIDTHxHEADS/PATCH (default S/2)"
    )
    command.add_argument("--batch", nargs="+", type=int, default=[64], metavar="IMAGES", help="batch sizes (default 64)")
    command.add_argument("--precision", nargs="+", default=["fp32"], metavar="fp32|bf16", help="bf16 is autocast (default fp32)")
    command.add_argument(
        "--compile",
        nargs="?",
        const="blocks",
        default="none",
        metavar="HOW",
        help="compile ours: blocks (default) or cuda_graphs, as system.compile; plain code stays as it is",
    )
    command.add_argument(
        "--against",
        nargs="*",
        default=["naive"],
        metavar="naive|fp32|METHOD",
        help="baselines: plain code (default), the same in fp32, or another method",
    )
    command.add_argument(
        "--together", action="store_true", help="all methods in turns, not each with its baselines: needs the memory of all"
    )
    command.add_argument("--guidance", type=float, default=1.5, metavar="SCALE", help="in sampling; 1: none (default 1.5)")
    command.add_argument("--repeats", type=int, default=7, help="rounds (default 7)")
    command.add_argument("--seconds", type=float, default=0.5, help="of one turn at least, or one step (default 0.5)")
    command.add_argument("--threads", type=int, default=0, help="on a CPU (default: as many as torch takes here)")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    command.add_argument("--parts", action="store_true", help="time parts of the methods and the loader, not the methods")
    command.add_argument("--profile", type=Path, metavar="FOLDER", help="write a trace and the top operations of each there")
    command.add_argument("--out", type=Path, metavar="FILE.csv", help="write the rows, and bars beside them as PNG and PDF")
    command.add_argument("settings", nargs="*", metavar="key=value", help="settings of all, for example train.beta2=0.95")
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace, plain: "Plain", parts: "Mapping[str, Part]") -> int:
    """`plain` and `parts`: what the methods are timed beside."""
    from bench.throughput import report

    check(parsed)
    setup = setup_of(parsed)
    facts = report.facts_of_run(setup)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    measured = parts_rows(parsed, setup, parts) if parsed.parts else method_rows(parsed, setup, plain, console)
    if parsed.out:
        folder_to_write(parsed.out.parent)
    rows: list[Row] = []
    paths: list[Path] = []
    try:
        for done in measured:
            rows += done
            if parsed.out:
                paths = write(report.frame_of(rows, facts), parsed.out)
    finally:  # also when it is interrupted
        if rows:
            console.print(report.to_rich(report.frame_of(rows, facts)))
        for path in paths:
            print(path)
    return 0


def check(parsed: argparse.Namespace) -> None:
    """ValueError in one sentence for what is not allowed."""
    for name, least in (("repeats", 1), ("threads", 0), ("seconds", 0)):
        if not getattr(parsed, name) >= least:
            raise ValueError(f"--{name} is {getattr(parsed, name)}: give at least {least}")
    for name in ("methods", "against", "size", "precision"):
        for word in getattr(parsed, name):
            if "=" in word.partition(":")[0]:  # what stands behind a colon are a method's options
                raise ValueError(f"--{name} is given {word}, which is a setting: give settings before all flags, or after --")
    if not parsed.guidance >= 0:
        raise ValueError(f"--guidance is {parsed.guidance}: give a scale of at least 0; 1 is no guidance")
    if parsed.out and (parsed.out.suffix != ".csv" or parsed.out.is_dir()):
        raise ValueError(f"--out is {parsed.out}: give the name of a file that ends in .csv")
    if parsed.parts and (parsed.methods or parsed.profile or parsed.settings or parsed.compile != "none"):
        raise ValueError("--parts times parts alone: leave out --methods, --profile, --compile and settings")


def setup_of(parsed: argparse.Namespace) -> "Setup":
    import torch

    from bench import job
    from bench.throughput.contest import Setup

    job.find_device(parsed.device)
    return Setup(parsed.device, parsed.threads or torch.get_num_threads(), parsed.guidance, tuple(parsed.settings))


def method_rows(parsed: argparse.Namespace, setup: "Setup", plain: "Plain", console: Console) -> "Iterator[list[Row]]":
    from bench.throughput.contest import config_of, contestants, with_baselines
    from bench.throughput.entrant import Entrant
    from bench.throughput.measure import Task, measure_all
    from bench.throughput.trace import profile_entrant

    chosen = contestants(parsed.methods, parsed.size, parsed.batch, parsed.precision, parsed.compile)
    for contestant in with_baselines(chosen, parsed.against):
        config_of(contestant, setup)  # refuses what is not allowed, before anything takes time
    if parsed.profile:
        folder_to_write(parsed.profile)

    def look(entrant: Entrant) -> None:
        if parsed.profile:
            console.print(profile_entrant(entrant, parsed.profile), markup=False, highlight=False, soft_wrap=True)

    task = Task(setup, plain, parsed.against, parsed.repeats, parsed.seconds, parsed.together, tell, look)
    return measure_all(chosen, task)


def parts_rows(parsed: argparse.Namespace, setup: "Setup", parts: "Mapping[str, Part]") -> "Iterator[list[Row]]":
    from bench.throughput.contest import contestants
    from bench.throughput.parts import measure_parts

    contestants([], parsed.size, parsed.batch, parsed.precision, "none")  # refuses what is not allowed
    sizes, batches, precisions = (list(dict.fromkeys(each)) for each in (parsed.size, parsed.batch, parsed.precision))
    return measure_parts(parts, sizes, batches, precisions, setup, parsed.repeats, parsed.seconds, tell)


def folder_to_write(folder: Path) -> None:
    """It is there afterwards. ValueError, before anything takes time, where nothing can be written into it."""
    from bench.files import make_folder

    make_folder(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose a folder that can be written") from None


def tell(what: str) -> None:
    Console(stderr=True).print(f"{what} ...", style="dim", highlight=False, markup=False, soft_wrap=True)


def write(frame: "pd.DataFrame", out: Path) -> list[Path]:
    """The CSV, and the figure beside it."""
    from bench.figures import style
    from bench.figures.speed import speed
    from bench.files import make_folder
    from bench.throughput import report

    make_folder(out.parent)
    report.write_csv(frame, out)
    paths = [out]
    with style.settings():
        for drawn in speed(frame, out.stem):
            paths += style.save(drawn, out.parent)
    return paths
