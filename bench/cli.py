"""The command `tsbench`: what can be asked of the suite from a shell?

Exit codes: 0 done; 1 a run failed or diverged, or jobs could not be cancelled; 2 something that was given is not allowed;
3 a table that would not be fair is refused; 130 interrupted.
"""

import argparse
import io
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from bench import data_commands, plan, result_commands, sweeps
from bench.throughput import command as throughput

RESULTS = Path("results")
DESCRIPTION = "Timestep-specialised diffusion transformers under one trainer, at equal budgets, scored by one frozen protocol."
START = "Start with `tsbench demo --quick`; every command explains itself with --help."
MEMORY = "choose a smaller model or train.batch_size, or more train.micro_batches"


# Imports are made where they are needed, so that help and refusals come at once.


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. `arguments`: those of this process by default."""
    if arguments is None:
        signal.signal(signal.SIGTERM, _interrupt)  # a polite kill is as good as Ctrl-C: children end, what is held is let go
    resumable = False
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            parsed = _parse(arguments)
            parsed.may_listen = arguments is None  # to signals: the process is ours
            resumable = getattr(parsed, "resumable", False)
            return int(parsed.run(parsed) or 0)
        except ValueError as error:
            return _refuse(str(error), _exit_code(error))
        except BrokenPipeError:  # who read our output has gone away, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            return _refuse(f"cannot read or write{where} ({error.strerror or error}): make room, or choose another folder", 2)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return _refuse(f"there is not enough memory ({_first_line(error)}): {MEMORY}", 2)
        except KeyboardInterrupt:
            if arguments is None:  # Ctrl-C reaches a child twice, from the terminal and from us: let it end in peace
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return _refuse("stopped" + "; the same command goes on from the last checkpoint" * resumable, 130)


def _refuse(message: str, code: int) -> int:
    print(f"tsbench: {' '.join(message.split())}", file=sys.stderr)
    return code


def _exit_code(error: ValueError) -> int:
    from bench.tables import TableRefusal

    return 3 if isinstance(error, TableRefusal) else 2


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a class of its own for accelerators alone."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


class Parser(argparse.ArgumentParser):
    """Refuses in one line, and lists the settings only when help is asked for."""

    lists_settings = False

    def error(self, message: str) -> NoReturn:
        message = message.replace(", key=value", "")  # argparse calls it required where another word is missing
        self.exit(2, f"tsbench: {message}: see `{self.prog} --help`\n")

    def format_help(self) -> str:
        return super().format_help() + (f"\n{_settings_help()}\n" if self.lists_settings else "")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; settings may stand anywhere after the command."""
    parser = make_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if "run" not in parsed:
        parser.print_help()
        parser.error("no command was given")
    takes_settings = "settings" in parsed
    unknown = [text for text in rest if text.startswith("-") or "=" not in text or not takes_settings]
    if unknown:
        hint = "; settings are given as key=value" if takes_settings else ""
        parser.error(f"{' '.join(unknown)} is not understood{hint}")
    if rest:
        parsed.settings = [*parsed.settings, *rest]
    return parsed


def make_parser() -> Parser:
    parser = Parser(prog="tsbench", description=DESCRIPTION, epilog=START)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="the six methods on real digits: train, score, table and figures",
        description="Train and score the six methods on real digits, and show the table and the figures. "
        "Runs that are finished are reused, others are resumed.",
    )
    demo.add_argument("--quick", action="store_true", help="the same path in about two minutes, far from converged")
    demo.add_argument("--fresh", action="store_true", help="delete this demo's runs and start over")
    demo.add_argument("--out", type=Path, help="folder for runs and results (default results/demo, or results/demo-quick)")
    demo.add_argument("--workers", type=int, help="runs side by side (default: one per processor)")
    demo.add_argument("settings", nargs="*", metavar="key=value", help="settings for all runs, for example seed=1")
    demo.set_defaults(run=run_demo, resumable=True)

    train = commands.add_parser(
        "train", help="train and score one run, or resume it", description="Train and score one run, or resume it."
    )
    train.lists_settings = True
    train.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file, or a run folder to go on with; default: the settings alone"
    )
    train.add_argument("settings", nargs="*", metavar="key=value", help="settings on top of the file")
    train.add_argument("--runs", type=Path, default=RESULTS / "runs", help="where the run's folder goes (default results/runs)")
    train.add_argument("--expert", type=int, help="with system.experts=separate_jobs: train only this one, from 0 on")
    train.set_defaults(run=run_train, resumable=True)

    plan.add_parser(commands)
    sweeps.add_parsers(commands)

    sample = commands.add_parser("sample", help="draw images from a trained run", description="Draw images from a trained run.")
    sample.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    sample.add_argument(
        "settings", nargs="*", metavar="key=value", help="for example evaluation.num_samples=100 evaluation.guidance_scale=1.5"
    )
    sample.add_argument("--out", type=Path, required=True, help="an .npz file (ADM's form: arr_0, uint8, NHWC) or a .png grid")
    sample.set_defaults(run=run_sample)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a trained run again, under other evaluation settings",
        description="Score a trained run again, under other evaluation settings; the scores are added to its eval.json.",
    )
    evaluate.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    evaluate.add_argument("settings", nargs="*", metavar="key=value", help="for example evaluation.steps=250")
    evaluate.set_defaults(run=run_evaluate)

    data_commands.add_parsers(commands)
    result_commands.add_parsers(commands)
    throughput.add_parser(commands, run_throughput)
    return parser


def _settings_help() -> str:
    from dataclasses import asdict

    from bench.job import OPTIONS, make_config
    from bench.settings import flat_settings

    defaults = {**asdict(make_config({})), "options": None}
    lines = ["settings and their defaults:"]
    lines += [f"  {key}={_shown(value)}" for key, value in flat_settings(defaults).items() if key != "options"]
    lines.append("options.NAME, by method:")
    for method, options in OPTIONS.items():
        lines.append(f"  {method}: " + (" ".join(f"{name}={_shown(default)}" for name, default in options.items()) or "none"))
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_demo(parsed: argparse.Namespace) -> int:
    from bench import demo, show
    from bench.suite import load_suite
    from bench.watch import default_workers

    name = "demo-quick" if parsed.quick else "demo"
    suite = load_suite(name)
    out = parsed.out or RESULTS / name
    if parsed.workers is not None and parsed.workers < 1:
        raise ValueError(f"--workers is {parsed.workers}: give at least 1")
    console = Console()
    plan = demo.make_plan(suite, out, parsed.settings)
    workers = parsed.workers or default_workers(max(config.train.threads for config in plan.configs))
    if parsed.fresh:
        demo.start_over(plan)
    failures = demo.run_plan(plan, workers, console)
    for run, cause in failures.items():
        print(f"tsbench: run {run} failed: {cause}", file=sys.stderr)
    if failures:
        return 1
    found = [run for run in show.find(out, plan.protocol_hash) if run.path in plan.folders]
    show.write_tables(out, show.results_of_runs(out, found), suite, console)
    figures = show.write_figures(out, found, suite)
    console.print(f"\nFigures ({len(figures)} files): {out / 'figures'}")
    console.print(f"Tables: {out / 'table.md'}, {out / 'table.tex'}; tidy results: {out / 'results.csv'}")
    return 0


def run_train(parsed: argparse.Namespace) -> int:
    from bench import job
    from bench.distributed import world_from_environment
    from bench.files import read_yaml
    from bench.journal import Diverged
    from bench.stopping import StopFlag
    from bench.trainer import Interrupted

    settings, source = list(parsed.settings), parsed.config
    if source is not None and "=" in source:
        settings, source = [source, *settings], None
    if source is not None and Path(source).is_dir():
        folder = Path(source)
        config = job.read_config(folder, settings)
    else:
        tree = read_yaml(Path(source)) if source is not None else {}
        if source is not None and not tree:
            raise ValueError(f"{source} holds no settings: give some, or leave it out to train with the defaults")
        config = job.make_config(tree, settings)
        folder = parsed.runs / config.run_id
    stop = StopFlag()
    if parsed.may_listen:
        stop.listen(signal.SIGTERM, signal.SIGINT)
    with world_from_environment(job.find_device(config.system.device)) as world:
        try:
            job.run(config, folder, world, stop, parsed.expert)
        except Diverged as error:
            return _refuse(f"training diverged: {error}", 1)
        except Interrupted as error:
            return _refuse(f"{error}; the same command goes on from there", 130)
        if world.is_main and (folder / "done").exists():
            print_run(folder)
    return 0


def print_run(folder: Path) -> None:
    from bench.runs import read_run

    records = read_run(folder).evaluations  # none of a run on latents
    scores = ", ".join(f"{name} {value:.4g}" for name, value in records[-1]["metrics"].items()) if records else "trained"
    print(f"{folder}: {scores}")


def run_sample(parsed: argparse.Namespace) -> int:
    from bench import adm, trained
    from bench.files import write_bytes_atomically

    out: Path = parsed.out
    if out.suffix not in (".npz", ".png") or out.is_dir():
        raise ValueError(f"--out is {out}: give the name of a file that ends in .npz or .png")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent}: create it, or choose another --out")
    samples = trained.draw_samples(parsed.folder, parsed.settings)
    if out.suffix == ".npz":
        adm.write_samples(out, samples.images, samples.labels)
    else:
        from torchvision.transforms.functional import to_pil_image
        from torchvision.utils import make_grid

        content = io.BytesIO()
        to_pil_image(make_grid(samples.images, nrow=10)).save(content, "png")
        write_bytes_atomically(out, content.getvalue())
    print(f"{len(samples.images)} images at {samples.images_per_second:.1f} images/s: {out}")
    return 0


def run_evaluate(parsed: argparse.Namespace) -> int:
    from bench import trained

    trained.evaluate_again(parsed.folder, parsed.settings)
    print_run(parsed.folder)
    return 0


def run_throughput(parsed: argparse.Namespace) -> int:
    from bench.throughput.entrant import Plain
    from methods.naive import make_plain
    from methods.naive_parts import PARTS
    from methods.naive_updates import loop_updates

    return throughput.run(parsed, Plain(make_plain, loop_updates), PARTS)
