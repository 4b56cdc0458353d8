"""What does `tsbench throughput` write and print, and what does it refuse?"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from timing import SIZE, TINY

from bench import cli
from bench.figures import style
from bench.figures.speed import speed
from bench.throughput import measure
from bench.throughput.entrant import Entrant
from bench.throughput.report import frame_of, to_rich
from methods.naive_parts import PARTS

FACTS = ("device", "threads", "date", "commit", "dirty", "torch", "cuda", "driver", "python", "settings")
COLUMNS = (
    *("what", "method", "code", "size", "batch_size", "precision", "compile", "beside", "note", "rounds"),
    *("step_seconds", "step_seconds_low", "step_seconds_high", "guidance_scale", "sampling_steps", "images_per_second"),
    *("forward_macs_per_image", "flops_per_second", "mfu", "mfu_of_vendor_peak"),
    *("peak_flops_per_second", "vendor_flops_per_second"),
    *("speed_over_naive", "speed_over_naive_low", "speed_over_naive_high", "peak_memory_bytes", "memory"),
)


def throughput(*arguments):
    return cli.main(["throughput", *arguments])


def test_the_csv_the_figure_and_the_table(tmp_path, capsys):
    out = tmp_path / "new" / "cpu.csv"
    arguments = ("--methods", "dense", "dit_moe:experts=4,top_k=1", "--out", str(out), "--profile", str(tmp_path / "profile"))
    assert throughput(*TINY, *arguments, "train.beta2=0.95") == 0
    frame = pd.read_csv(out, keep_default_na=True)
    assert list(frame) == [*COLUMNS, *FACTS]
    assert len(frame) == 2 * 2 * 2
    assert set(frame["torch"]) == {torch.__version__} and set(frame["threads"]) == {1}
    assert set(frame["settings"]) == {"train.beta2=0.95"} and frame["device"].notna().all()
    ours = frame[frame["code"] == "ours"]
    assert (ours["speed_over_naive"] > 0).all() and frame[frame["code"] == "naive"]["speed_over_naive"].isna().all()
    assert {path.name for path in out.parent.iterdir()} == {"cpu.csv", "cpu.png", "cpu.pdf"}
    printed = capsys.readouterr().out
    assert "training step, 2x16x2/8, batch 4" in printed and "dit_moe:experts=4,top_k=1 fp32 naive" in printed
    assert str(out) in printed and "aten::" in printed
    traces = sorted((tmp_path / "profile").glob("*.json"))
    assert len(traces) == 8 and len(list((tmp_path / "profile").glob("*.txt"))) == 8
    assert json.loads(traces[0].read_text())["traceEvents"]


def test_what_was_measured_is_kept_when_the_command_ends_early(tmp_path, monkeypatch, capsys):
    out = tmp_path / "cpu.csv"
    there = []

    def build(contestant, *others):
        if contestant.method == "dtr":
            there.extend(sorted(path.name for path in tmp_path.iterdir()))
            raise KeyboardInterrupt
        return Entrant(contestant, *others)

    monkeypatch.setattr(measure, "Entrant", build)
    assert throughput(*TINY, "--methods", "dense", "dtr", "--out", str(out)) == 130
    assert there == ["cpu.csv", "cpu.pdf", "cpu.png"]  # a process that is killed leaves as much
    frame = pd.read_csv(out, keep_default_na=True)
    assert list(frame) == [*COLUMNS, *FACTS] and set(frame["method"]) == {"dense"} and len(frame) == 4
    captured = capsys.readouterr()
    assert "training step, 2x16x2/8, batch 4" in captured.out and str(out) in captured.out
    assert captured.err.splitlines()[-1] == "tsbench: stopped"


def test_each_part_is_kept_when_it_is_done(tmp_path, monkeypatch, capsys):
    def stop(size, batch_size, device):
        raise KeyboardInterrupt

    first = next(iter(PARTS))
    monkeypatch.setattr("methods.naive_parts.PARTS", {first: PARTS[first], "next": stop})
    out = tmp_path / "parts.csv"
    assert throughput("--parts", *TINY, "--out", str(out)) == 130
    assert set(pd.read_csv(out)["what"]) == {first} and first in capsys.readouterr().out


def test_what_is_asked_for_twice_is_timed_once(tmp_path, monkeypatch):
    first = next(iter(PARTS))
    monkeypatch.setattr("methods.naive_parts.PARTS", {first: PARTS[first]})
    monkeypatch.setattr("bench.throughput.parts.LOADERS", {})
    out = tmp_path / "parts.csv"
    assert throughput("--parts", *TINY, "--precision", "fp32", "bf16", "fp32", "--batch", "4", "4", "--out", str(out)) == 0
    assert list(pd.read_csv(out)["precision"]) == ["fp32", "fp32", "bf16", "bf16"]  # ours, and plain


def test_nothing_is_written_where_nothing_was_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "Entrant", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert throughput(*TINY, "--methods", "dense", "--out", str(tmp_path / "cpu.csv")) == 130
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "0"), "--batch is 0: give at least 1"),
        (("--precision", "fp8"), "choose from fp32, bf16"),
        (("--methods", "other"), "'other' is not known"),
        (("--methods", "dtr:gamma=1"), "has no option gamma"),
        (("--against", "other"), "'other' is not known"),
        (("--size", "Q/2"), "'Q/2' is not known"),
        (("--size", "2x15x2/8"), "15"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--guidance", "nan"), "--guidance is nan"),
        (("--out", "figures.png"), "ends in .csv"),
        (("--device", "cuda:99"), "cannot be used here"),
        (("--compile", "everything"), "system.compile is 'everything'"),
        (("--compile", "cuda_graphs"), "system.compile is cuda_graphs, which need a GPU"),
        (("evaluation.sampler=dpm_solver",), "evaluation.sampler is dpm_solver"),
        (("--methods", "dense", "train.beta2=0.9"), "--methods is given train.beta2=0.9, which is a setting"),
        (("--against", "train.beta2=0.9"), "--against is given train.beta2=0.9, which is a setting"),
        (("model.widht=3",), "no setting model.widht"),
        (("train.batch_size=64",), "train.batch_size is what --batch says: give that"),
        (("--parts", "--methods", "dense"), "leave out"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_sentence(arguments, words, capsys):
    assert throughput(*TINY, *arguments) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.startswith("tsbench: ") and words in refusal


@pytest.mark.parametrize(
    "arguments",
    [
        ("--compile", "everything"),
        ("--compile", "cuda_graphs"),
        ("--against", "other"),
        ("model.widht=3",),
        ("evaluation.sampler=dpm_solver",),
        ("--out", "/dev/null/rows.csv"),
        ("--out", "/proc/rows.csv"),  # a folder that is there, and in which nobody can make a file
        ("--profile", "/proc"),
    ],
    ids=" ".join,
)
def test_a_refusal_comes_before_anything_that_takes_time(arguments, capsys):
    assert throughput(*TINY, *arguments) == 2
    (refusal,) = capsys.readouterr().err.splitlines()
    assert refusal.startswith("tsbench: ")


# What is shown


def row(method, code, seconds, **others):
    times = {"step_seconds": seconds, "step_seconds_low": seconds, "step_seconds_high": 2 * seconds}
    facts = {
        "what": "training step",
        "size": SIZE,
        "batch_size": 4,
        "precision": "fp32",
        "compile": "none",
        "beside": "",
        "note": "",
    }
    return {**facts, "method": method, "code": code, **times, "images_per_second": 4 / seconds, **others}


def test_bars_are_images_per_second_with_quartiles():
    frame = frame_of([row("one", "ours", 0.5), row("one", "naive", 1.0), row("other", "ours", 0.25)], {"device": "a device"})
    with style.settings():
        (drawn,) = speed(frame, "cpu")
    (axes,) = drawn.figure.axes
    widths = sorted(patch.get_width() for patch in axes.patches if patch.get_width() > 0 and patch.get_height() > 0)
    assert widths[-3:] == [4.0, 8.0, 16.0]
    whiskers = sorted(tuple(sorted(line.get_xdata())) for line in axes.lines if len(line.get_xdata()) == 2)
    assert whiskers[:1] == [(2.0, 4.0)] and (8.0, 16.0) in whiskers
    assert drawn.data is None  # the CSV beside it holds what it shows
    assert "a device" in drawn.figure.get_suptitle()


def test_a_legend_tells_ours_from_plain_code_where_there_is_any():
    for codes in (["ours"], ["ours", "naive"]):
        with style.settings():
            (drawn,) = speed(frame_of([row("one", code, 0.5) for code in codes], {"device": "a device"}), "cpu")
        legend = drawn.figure.axes[0].get_legend()
        assert [text.get_text() for text in legend.get_texts()] == codes and legend.get_visible() == (len(codes) == 2)


def test_plain_code_stands_beside_ours_where_that_is_compiled_and_whiskers_lie_on_their_bars():
    ours = [row(name, "ours", 0.5, compile="blocks") for name in ("one", "other")]
    frame = frame_of([*ours, row("one", "naive", 1.0), row("other", "naive", 1.0)], {"device": "a device"})
    with style.settings():
        (drawn,) = speed(frame, "cpu")
    (axes,) = drawn.figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{name} {SIZE} batch 4 fp32" for name in ("one", "other")]
    assert "ours compiled: blocks" in drawn.figure.get_suptitle()
    middles = sorted(patch.get_y() + patch.get_height() / 2 for patch in axes.patches if patch.get_width() > 0)
    places = sorted(line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2)
    assert len(places) == 4 and np.allclose(middles[-4:], places)


def part_row(what, ratio, code="ours"):
    ratios = dict.fromkeys(["speed_over_naive", "speed_over_naive_low", "speed_over_naive_high"], ratio)
    return row("", code, 0.5, what=what, **ratios)


def test_bars_of_parts_begin_at_plain_code_and_show_doublings():
    slower, failed = part_row("slower", 0.5), part_row("without plain code", np.nan)
    rows = [part_row("loader", 32.0), part_row("loader", np.nan, "naive"), slower, failed]
    with style.settings():
        (drawn,) = speed(frame_of(rows, {"device": "a device"}), "parts")
    (axes,) = drawn.figure.axes
    assert [label.get_text().split(",")[0] for label in axes.get_yticklabels()] == ["loader", "slower"]
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.containers[0]] == [(1, 32), (1, 0.5)]
    assert axes.get_xscale() == "log" and axes.get_xlim()[0] < 0.5 and axes.get_xlim()[1] > 32
    assert speed(frame_of([failed], {"device": "a device"}), "parts") == []


@pytest.mark.parametrize(("scale", "unit", "told"), [(1.0, "", "without guidance"), (1.5, "guided ", "guided with scale 1.5")])
def test_images_of_a_sampling_step_are_of_all_steps(scale, unit, told):
    sampled = row("one", "ours", 0.5, what="sampling step", guidance_scale=scale, sampling_steps=250)
    frame = frame_of([row("one", "ours", 0.5), sampled], {"device": "a device"})
    with style.settings():
        (drawn,) = speed(frame, "cpu")
    assert [axes.get_xlabel() for axes in drawn.figure.axes] == ["images/s", f"images/s of 250 {unit}steps"]
    console = Console(width=140)
    with console.capture() as captured:
        console.print(to_rich(frame))
    assert f"Images/s of sampling are of 250 steps an image, {told}" in captured.get()


def test_a_baseline_is_drawn_once():
    frame = frame_of(
        [
            row("one", "ours", 0.5, beside="one"),
            row("base", "ours", 0.25, beside="one"),
            row("base", "ours", 0.125, beside="base"),
            row("other", "ours", 1.0, beside="other"),
            row("third", "ours", 2.0, beside="one"),
            row("third", "ours", 3.0, beside="other"),
        ],
        {"device": "a device"},
    )
    with style.settings():
        (drawn,) = speed(frame, "cpu")
    labels = [label.get_text().split()[0] for label in drawn.figure.axes[0].get_yticklabels()]
    assert labels == ["one", "base", "other", "third"]
    texts = {text.get_text() for text in drawn.figure.axes[0].texts}
    assert texts == {"8", "32", "4", "2"}


def test_what_could_not_be_timed_is_not_drawn_but_named():
    failed = row("one", "ours", np.nan, note="out of memory: 3 GB")
    frame = frame_of([failed], {"device": "a device"})
    assert speed(frame, "cpu") == []
    console = Console(width=140)
    with console.capture() as captured:
        console.print(to_rich(frame))
    assert "out of memory: 3 GB" in captured.get() and "–" in captured.get()
