"""Where does the time of a step go? A trace for chrome://tracing or Perfetto, and the operations that take most."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.files import write_text_atomically
from bench.throughput.clock import Call, synchroniser
from bench.throughput.entrant import Entrant

NUM_STEPS = 3
NUM_OPERATIONS = 12


def profile_entrant(entrant: Entrant, folder: Path) -> str:
    """The table of both steps; it is also written to `folder`, with a trace of each."""
    device = entrant.trainer.device
    tables = []
    for what, run in (("training", entrant.train), ("sampling", entrant.sample)):
        name = re.sub("[^a-z0-9]+", "-", f"{entrant.contestant.label} {what}".lower()).strip("-")
        table = profile_steps(run, device, folder / f"{name}.trace.json")
        tables.append(f"{what} step of {entrant.contestant.label}\n{table}")
        write_text_atomically(folder / f"{name}.txt", table + "\n")
    entrant.settle()
    return "\n".join(tables)


def profile_steps(run: Call, device: torch.device, trace: Path) -> str:
    """A few steps; writes the trace and gives the operations by their own time on the device."""
    on_gpu = device.type == "cuda"
    wait = synchroniser(device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    run()
    wait()
    with profile(activities=activities, acc_events=True) as profiler:  # torch 2.11 warns that it forgets otherwise
        for _ in range(NUM_STEPS):
            run()
        wait()
    profiler.export_chrome_trace(str(trace))
    return table_of(profiler.key_averages(), on_gpu)


def table_of(averages: Iterable[Any], on_gpu: bool) -> str:
    """Of a few steps. On a GPU kernels alone: each counts again in the operation that starts it, and in ranges around it."""
    if on_gpu:
        averages = [each for each in averages if each.device_type != DeviceType.CPU and not each.is_user_annotation]
    own = (lambda event: event.self_device_time_total) if on_gpu else (lambda event: event.self_cpu_time_total)
    events = sorted(averages, key=own, reverse=True)
    total = sum(own(event) for event in events) or 1.0
    lines = [f"{'operation':<48} {'ms/step':>9} {'share':>6} {'calls/step':>10}"]
    for event in events[:NUM_OPERATIONS]:
        name = event.key if len(event.key) <= 48 else event.key[:45] + "..."
        milliseconds = own(event) / 1000 / NUM_STEPS
        lines.append(f"{name:<48} {milliseconds:9.3f} {own(event) / total:6.1%} {event.count / NUM_STEPS:10.1f}")
    return "\n".join(lines)
