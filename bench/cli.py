"""The command `tsbench`: what can be asked of the suite from a shell?

Exit codes: 0 done; 1 a run failed or diverged; 2 something that was given is not allowed; 3 a table that would not be
fair is refused; 130 interrupted.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console

RESULTS = Path("results")
DESCRIPTION = "Timestep-specialised diffusion transformers under one trainer, at equal budgets, scored by one frozen protocol."
SETTINGS = "settings as key=value, for example train.lr=1e-3 options.experts=8 (see `tsbench train --help`)"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed) or 0)
    except ValueError as error:
        print(f"tsbench: {error}", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt:
        print("tsbench: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _exit_code(error: ValueError) -> int:
    from bench.tables import TableRefusal

    return 3 if isinstance(error, TableRefusal) else 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tsbench", description=DESCRIPTION)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the six methods on real digits: train, score, table and figures")
    demo.add_argument("--quick", action="store_true", help="the same path in about two minutes, far from converged")
    demo.add_argument("--fresh", action="store_true", help="start over instead of resuming and reusing runs")
    demo.add_argument("--out", type=Path, help="folder for runs and results (default results/demo, or results/demo-quick)")
    demo.add_argument("--workers", type=int, help="runs side by side (default: one per processor)")
    demo.add_argument("settings", nargs="*", metavar="key=value", help="settings for all runs")
    demo.set_defaults(run=run_demo)

    train = commands.add_parser(
        "train",
        help="train and score one run, or resume it",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file, or a run folder to go on with; default: the settings alone"
    )
    train.add_argument("settings", nargs="*", metavar="key=value", help="settings on top of the file")
    train.add_argument("--runs", type=Path, default=RESULTS / "runs", help="where the run's folder goes (default results/runs)")
    train.set_defaults(run=run_train)

    sample = commands.add_parser("sample", help="draw images from a trained run")
    sample.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    sample.add_argument(
        "settings", nargs="*", metavar="key=value", help="for example evaluation.num_samples=100 evaluation.guidance_scale=1.5"
    )
    sample.add_argument("--out", type=Path, required=True, help="an .npz file (ADM's form: arr_0, uint8, NHWC) or a .png grid")
    sample.set_defaults(run=run_sample)

    evaluate = commands.add_parser("evaluate", help="score a trained run, also under other evaluation settings")
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    evaluate.add_argument("settings", nargs="*", metavar="key=value", help="for example evaluation.steps=250")
    evaluate.set_defaults(run=run_evaluate)

    for name, text in (
        ("collect", "gather the runs of a folder into one tidy results.csv"),
        ("tables", "the comparison table of a folder's runs: Markdown and LaTeX"),
        ("plots", "the figures of a folder's runs: PNG, PDF and the data shown"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folder", type=Path, metavar="FOLDER", help="a folder with runs/, for example results/demo")
        command.add_argument("--suite", default="demo", help="the suite that gives title, labels and colours (default demo)")
        command.set_defaults(run={"collect": run_collect, "tables": run_tables, "plots": run_plots}[name])
    return parser


def _settings_help() -> str:
    from dataclasses import asdict

    from bench.config import RunConfig
    from bench.job import OPTIONS

    lines = ["settings and their defaults:"]
    for key, value in asdict(RunConfig()).items():
        if isinstance(value, dict) and key != "options":
            lines += [f"  {key}.{inner}={_shown(default)}" for inner, default in value.items()]
        elif key != "options":
            lines.append(f"  {key}={_shown(value)}")
    lines.append("options.NAME, by method:")
    for method, options in OPTIONS.items():
        lines.append(f"  {method}: " + (" ".join(f"{name}={_shown(default)}" for name, default in options.items()) or "none"))
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_demo(parsed: argparse.Namespace) -> int:
    from bench import demo
    from bench.suite import load_suite

    name = "demo-quick" if parsed.quick else "demo"
    suite = load_suite(name)
    out = parsed.out or RESULTS / name
    workers = demo.default_workers(threads=1) if parsed.workers is None else parsed.workers
    if workers < 1:
        raise ValueError(f"--workers is {workers}: give at least 1")
    if parsed.fresh:
        demo.start_over(out)
    console = Console()
    failures = demo.run_suite(suite, out, parsed.settings, workers, console)
    for run, cause in failures.items():
        print(f"tsbench: run {run} failed: {cause}", file=sys.stderr)
    if failures:
        return 1
    show_results(out, suite, console)
    return 0


def write_results(folder: Path) -> Path:
    """`results.csv` from the folder's runs."""
    from bench import runs

    path = folder / "results.csv"
    runs.write_results(_tidy(folder), path)
    return path


def write_tables(folder: Path, suite: dict[str, Any], console: Console) -> None:
    """`results.csv`, `table.md` and `table.tex` from the folder's runs; prints the table."""
    from bench import tables

    frame = _tidy(folder)
    table = tables.comparison(frame, suite)
    tables.write_tables(table, frame, folder)
    console.print(tables.to_rich(table))


def write_figures(folder: Path, suite: dict[str, Any]) -> list[Path]:
    """Everything in `figures/`, from the folder's runs; the files written."""
    from bench import plots, runs

    found = runs.find_runs(folder)
    real = real_images(found[0].config) if found else None
    floor = runs.read_floor(folder / "floor.json")
    return plots.make_figures(found, suite, folder / "figures", floor=floor, real_images=real)


def real_images(config: dict[str, Any]) -> Any:
    """Held-out images (n, H, W, C) uint8, image i of class i mod the number of classes; None for data that are not pixels."""
    import torch

    from bench.config import DataConfig
    from bench.data import load_data, to_uint8

    data = load_data(DataConfig(**config["data"]))
    if not data.pixels:
        return None
    x, _ = data.heldout.batch(torch.arange(min(len(data.heldout), 100)))
    return to_uint8(x).permute(0, 2, 3, 1).numpy()


def _tidy(folder: Path) -> Any:
    from bench import runs

    return runs.tidy(runs.find_runs(folder), runs.read_floor(folder / "floor.json"))


def show_results(out: Path, suite: dict[str, Any], console: Console) -> None:
    """Write results.csv, the tables and the figures of a folder, and print the table."""
    write_tables(out, suite, console)
    figures = write_figures(out, suite)
    console.print(f"\nFigures ({len(figures)}, PNG and PDF): {out / 'figures'}")
    console.print(f"Tables: {out / 'table.md'}, {out / 'table.tex'}; tidy results: {out / 'results.csv'}")


def run_train(parsed: argparse.Namespace) -> int:
    import torch

    from bench import job
    from bench.config import read_yaml
    from bench.distributed import world_from_environment
    from bench.journal import Diverged

    settings = list(parsed.settings)
    source = parsed.config
    if source is not None and "=" in source:
        settings, source = [source, *settings], None
    path = Path(source) if source is not None else None
    is_run = path is not None and path.is_dir()
    file = path / "config.yaml" if path is not None and is_run else path
    config = job.make_config(read_yaml(file) if file is not None else {}, settings)
    folder = path if path is not None and is_run else parsed.runs / config.run_id
    with world_from_environment(torch.device(config.system.device)) as world:
        try:
            job.run(config, folder, world)
        except Diverged as error:
            print(f"tsbench: training diverged: {error}", file=sys.stderr)
            return 1
        if world.is_main:
            print_run(folder)
    return 0


def print_run(folder: Path) -> None:
    from bench.runs import read_run

    record = read_run(folder).evaluations[-1]
    scores = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
    print(f"{folder}: {scores}")


def run_sample(parsed: argparse.Namespace) -> int:
    from bench import adm, job

    if parsed.out.suffix not in (".npz", ".png"):
        raise ValueError(f"--out is {parsed.out}: give a name that ends in .npz or .png")
    if not parsed.out.parent.is_dir():
        raise ValueError(f"there is no folder {parsed.out.parent}: create it, or choose another --out")
    samples = job.draw_samples(parsed.folder, parsed.settings)
    if parsed.out.suffix == ".npz":
        adm.write_samples(parsed.out, samples.images)
    else:
        from torchvision.transforms.functional import to_pil_image
        from torchvision.utils import make_grid

        to_pil_image(make_grid(samples.images, nrow=10)).save(parsed.out)
    print(f"{len(samples.images)} images at {samples.images_per_second:.1f} images/s: {parsed.out}")
    return 0


def run_evaluate(parsed: argparse.Namespace) -> int:
    from bench import job

    job.evaluate_again(parsed.folder, parsed.settings)
    print_run(parsed.folder)
    return 0


def run_collect(parsed: argparse.Namespace) -> int:
    print(write_results(parsed.folder))
    return 0


def run_tables(parsed: argparse.Namespace) -> int:
    from bench.suite import load_suite

    write_tables(parsed.folder, load_suite(parsed.suite), Console())
    print(f"\n{parsed.folder / 'table.md'}, {parsed.folder / 'table.tex'}")
    return 0


def run_plots(parsed: argparse.Namespace) -> int:
    from bench.suite import load_suite

    for path in write_figures(parsed.folder, load_suite(parsed.suite)):
        print(path)
    return 0
