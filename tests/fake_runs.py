"""Small made-up run folders, of every kind of diagnostic, for the tests of tables and figures.

`with_figures` is a fixture, offered to all tests by conftest.py.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.config import BudgetConfig, RunConfig, TrainConfig
from bench.files import read_yaml
from bench.runs import Run, read_run

SUITE = read_yaml(Path(__file__).parent.parent / "bench" / "suites" / "demo.yaml")
NUM_TIMESTEPS = 1000
NUM_CLASSES = 10
NUM_IMAGES = 256_000
DEPTH = 4
NUM_INTERVALS = {"multi_expert": 4, "remix_dit": 8}
PROTOCOL = {
    "extractor": "digits",
    "num_samples": 500,
    "sampler": "ancestral",
    "steps": "50",
    "guidance_scale": 1.0,
    "reference": {"train": "aa", "heldout": "bb"},
    "reference_path": "/somewhere/else",
}
FLOOR_RECORD = {
    "protocol_hash": "0123456789",
    "protocol": PROTOCOL,
    "n": 500,
    "metrics": {
        "fid_train": 1.31,
        "fid_heldout": 1.92,
        "kid": 0.00041,
        "precision": 0.962,
        "recall": 0.958,
        "inception_score": 9.4,
        "class_accuracy": 0.984,
        "nearest_neighbour": 0.412,
    },
}


@pytest.fixture(scope="session")
def with_figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs` and all of their `figures`, which take a quarter of a minute to draw: for the tests of the group "plots"."""
    from drawing import draw_all  # loads the libraries of figures, which most tests do without

    root = tmp_path_factory.mktemp("with_figures")
    paths = draw_all(root)
    assert sorted(paths) == sorted((root / "figures").iterdir())
    return root


def write_fake_runs(
    root: Path, methods: Sequence[dict[str, Any]] = SUITE["methods"], seeds: Sequence[int] = (0,), curve: Sequence[float] = ()
) -> list[Run]:
    """Runs under `root/runs` and `root/floor.json`; the same arguments give the same folders.

    `curve`: parts of training after which the runs were scored on their way.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "floor.json").write_text(json.dumps(FLOOR_RECORD))
    return [write_fake_run(root, method, seed, curve) for method in methods for seed in seeds]


def write_fake_run(root: Path, method: dict[str, Any], seed: int = 0, curve: Sequence[float] = ()) -> Run:
    name = method["method"]
    draw = np.random.default_rng(zlib.crc32(f"{name} {seed}".encode()))
    config = RunConfig(
        method=name,
        label=method.get("label", ""),
        seed=seed,
        options=dict(method.get("options", {})),
        budget=BudgetConfig("images", NUM_IMAGES),
        train=TrainConfig(init_from=method.get("init_from", "")),
    )
    folder = root / "runs" / config.run_id
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    edges = np.linspace(0, NUM_TIMESTEPS, NUM_INTERVALS.get(name, 1) + 1).astype(int)
    skill = draw.uniform(0.9, 1.1)
    private = name == "multi_expert"
    size = draw.uniform(0.62e6, 1.4e6)
    macs = draw.uniform(38e6, 95e6)
    with open(folder / "metrics.jsonl", "w") as file:
        for row in [*train_rows(edges, skill, draw), *heldout_rows(skill, draw)]:
            file.write(json.dumps(row) + "\n")
    write(
        folder / "provenance.json",
        {
            "commit": "b02412e5d3c4b5a69788796a5b4c3d2e1f000000",
            "dirty": False,
            "code_hash": "c0dec0dec0",
            "python": "3.12.3",
            "torch": "2.15.0",
            "platform": "Linux",
            "device": "cpu",
            "threads": 1,
            "world_size": 1,
            "started": f"2030-01-01T0{min(len(list((root / 'runs').iterdir())), 9)}:00:00+00:00",
            "command": ["tsbench", "train"],
        },
    )
    write(
        folder / "summary.json",
        {
            "stored_parameters": int(size * (len(edges) - 1)),
            "active_parameters": int(size),
            "forward_macs_per_image": macs,
            "train_flops": 6 * macs * NUM_IMAGES,
            "images_seen": NUM_IMAGES,
            "num_steps": NUM_IMAGES // 32,
            "updates_per_parameter_set": [2000] * 4 if private else [8000],
            "train_images_per_second": draw.uniform(300, 900),
            "device_seconds": draw.uniform(280, 850),
            "lost_images": 0,
            "lost_device_seconds": 0.0,
            "peak_memory_bytes": None,
            "initial_flops": 0.0,
            "num_intervals": len(edges) - 1,
        },
    )
    metrics = {
        "fid_train": draw.uniform(7, 14) * skill,
        "fid_heldout": draw.uniform(8, 15) * skill,
        "kid": draw.uniform(0.004, 0.011),
        "precision": draw.uniform(0.7, 0.9),
        "recall": draw.uniform(0.6, 0.9),
        "inception_score": draw.uniform(8, 9.3),
        "class_accuracy": draw.uniform(0.85, 0.97),
        "nearest_neighbour": draw.uniform(0.4, 0.6),
    }
    record = {"protocol_hash": "0123456789", "protocol": PROTOCOL, "n": 500, "metrics": metrics}
    beside = {"sample_images_per_second": draw.uniform(20, 60), "network_evaluations_per_sample": 50, "heldout_loss": 0.1 * skill}
    write(folder / "eval.json", [{**record, **beside}])
    if curve:
        write_curve(folder, record, curve)
    np.savez_compressed(folder / "samples.npz", arr_0=fake_images(draw, 60))
    diagnostics = fake_diagnostics(name, edges, draw)
    np.savez_compressed(folder / "diagnostics.npz", **diagnostics)
    (folder / "done").touch()
    return read_run(folder)


def write_curve(folder: Path, record: dict[str, Any], parts: Sequence[float]) -> None:
    """FIDs fall in proportion to the training; the other scores are those of the end."""
    summary, metrics = json.loads((folder / "summary.json").read_text()), record["metrics"]
    records = []
    for part in parts:
        worse = {name: value / part for name, value in metrics.items() if name.startswith("fid")}
        place = {name: summary[name] * part for name in ("images_seen", "train_flops", "device_seconds")}
        step = round(NUM_IMAGES / 32 * part)
        records.append({**record, "metrics": {**metrics, **worse}, "heldout_loss": 0.1 / part, "step": step, **place})
    write(folder / "curve.json", records)


def train_rows(edges: np.ndarray, skill: float, draw: np.random.Generator) -> list[dict[str, Any]]:
    """160 windows of 50 steps; losses fall with images and with the timestep."""
    rows = []
    num_intervals = len(edges) - 1
    for step in range(50, NUM_IMAGES // 32 + 1, 50):
        for index in range(num_intervals):
            middle = (edges[index] + edges[index + 1]) / 2 / NUM_TIMESTEPS
            mse = bin_loss(middle, step, skill) * draw.uniform(0.85, 1.15)
            place = {"step": step, "images_seen": step * 32, "train_flops": step * 1e10, "device_seconds": step * 0.05}
            interval = {"interval": index, "start": int(edges[index]), "stop": int(edges[index + 1])}
            losses = {"loss": mse * 1.01, "mse": mse, "vb": mse * 0.01, "penalty/balance": 0.02, "grad_norm": 0.5, "lr": 1e-3}
            rows.append({"kind": "train", **place, **interval, "num_steps": 50 // num_intervals, **losses})
    return rows


def heldout_rows(skill: float, draw: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for step in range(0, NUM_IMAGES // 32 + 1, 500):
        for index in range(20):
            place = {"step": step, "images_seen": step * 32, "train_flops": step * 1e10, "device_seconds": step * 0.05}
            edges = {"bin": index, "start": index * 50, "stop": index * 50 + 50}
            loss = bin_loss((index + 0.5) / 20, step, skill) * draw.uniform(0.97, 1.03)
            rows.append({"kind": "heldout", **place, **edges, "loss": loss, "n": 25})
    return rows


def bin_loss(position: float, step: int, skill: float) -> float:
    """A loss like a real one: 1 at the start, then higher at low noise (position 0) than at high."""
    final = skill * (0.005 + 0.4 * np.exp(-position * 5))
    return float(final + (1 - final) * np.exp(-step / 400))


def fake_images(draw: np.random.Generator, count: int) -> np.ndarray:
    """Blobs whose place depends on the class: (n, 8, 8, 1) uint8."""
    y, x = np.mgrid[0:8, 0:8]
    angle = 2 * np.pi * (np.arange(count) % NUM_CLASSES) / NUM_CLASSES
    cy, cx = 3.5 + 2 * np.sin(angle), 3.5 + 2 * np.cos(angle)
    distance = (y - cy[:, None, None]) ** 2 + (x - cx[:, None, None]) ** 2
    noisy = 230 * np.exp(-distance / 3) + draw.uniform(0, 25, distance.shape)
    return noisy.astype(np.uint8)[..., None]


REAL_IMAGES, REAL_NAMES = fake_images(np.random.default_rng(1), 60), [str(i) for i in range(NUM_CLASSES)]


def fake_diagnostics(name: str, edges: np.ndarray, draw: np.random.Generator) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {
        "intervals": np.stack([edges[:-1], edges[1:]], axis=1),
        "intervals/axes": np.array(["interval", "edge"]),
    }
    if name == "remix_dit":
        logits = 3 * np.eye(4)[np.arange(8) // 2] + draw.normal(size=(8, 4))
        growth = np.linspace(0.2, 1, 17)[:, None, None]
        shares = np.exp(growth * logits)
        history = shares / shares.sum(axis=-1, keepdims=True)
        arrays |= {"mixing_coefficients": history[-1], "mixing_coefficients/axes": np.array(["expert", "basis"])}
        arrays |= {"mixing_coefficients/history": history, "history/images_seen": np.linspace(0, NUM_IMAGES, 17)}
    if name == "dtr":
        start = ((np.arange(NUM_TIMESTEPS) / (NUM_TIMESTEPS - 1)) ** 4 * 20).round()[:, None]
        channel = np.arange(96)
        arrays |= {
            "channel_mask": (channel >= start) & (channel < start + 76),
            "channel_mask/axes": np.array(["timestep", "channel"]),
        }
    if name in ("switch_dit", "dit_moe"):
        groups, experts = (NUM_TIMESTEPS, 3) if name == "switch_dit" else (20, 8)
        centre = np.linspace(0, 1, experts) + draw.normal(size=(DEPTH, experts)) * 0.2
        distance = np.linspace(0, 1, groups)[None, :, None] - centre[:, None, :]
        routing = np.exp(-((distance / 0.35) ** 2))
        routing[DEPTH - 1, :, experts - 1] = 0  # a dead expert
        routing /= routing.sum(axis=-1, keepdims=True)
        arrays |= {"routing": routing, "routing/axes": np.array(["block", "timestep", "expert"])}
        arrays |= {"expert_usage": routing.mean(axis=1), "expert_usage/axes": np.array(["block", "expert"])}
    return arrays


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
