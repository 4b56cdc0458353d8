"""What of its runs does a comparison keep, so that all of it is made again without their weights, and is that still as it was?

`keep` leaves a slim folder of each run in `runs/` beside the results: all but checkpoints, logs and the images that no figure
shows. `kept.json` names every file with its hash, and the code behind each code hash once. What is kept is read like a run.
"""

import gzip
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.arrays import read_arrays, read_samples, read_trajectory
from bench.files import make_folder, read_json, write_bytes_atomically, write_json_atomically
from bench.runs import METRICS, Run, metrics_bytes
from bench.tidy import kept_provenance

KEPT, RUNS, REAL_IMAGES = "kept.json", "runs", "real_images.npz"
AS_THEY_ARE = ("config.yaml", "summary.json", "eval.json", "curve.json", "failure.json", "done")
NUM_SAMPLES, NUM_TRAJECTORIES = 20, 2  # as many as figures show
DRAWN_OVER_TRAINING = ("mixing_coefficients", "expert_usage")  # diagnostics; of the others, only the end is shown


class RealImages(NamedTuple):
    """What stands beside samples, so that it can be shown without the data."""

    images: np.ndarray | None  # (n, H, W, C) uint8, image i of class i mod the number of classes; None: no pixels
    class_names: list[str]


def keep(runs: Sequence[Run], folder: Path, real: RealImages) -> list[Path]:
    """Slim folders of runs that have ended in `folder/runs`; what was kept of others before is removed. The files written."""
    going_on = [run.run_id for run in runs if run.state in ("planned", "running")]
    if going_on:
        raise ValueError(f"runs {', '.join(going_on)} have not ended: finish them before they are kept, or leave them out")
    if any((folder / RUNS / run.run_id).resolve() == run.path.resolve() for run in runs):
        raise ValueError(f"the runs are in {folder / RUNS} themselves: name their suite, --runs, and another folder with --out")
    contents = {run.run_id: slim_files(run) for run in runs}  # all is read before anything is written
    for path in set(_kept_paths(folder)) - {folder / RUNS / run_id / name for run_id in contents for name in contents[run_id]}:
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    files = {Path(RUNS, run_id, name): content for run_id, own in contents.items() for name, content in own.items()}
    images = {} if real.images is None else {"images": real.images[:NUM_SAMPLES]}
    files[Path(REAL_IMAGES)] = _npz({**images, "class_names": np.array(real.class_names, dtype=np.str_)})
    for name, content in files.items():
        make_folder((folder / name).parent)
        write_bytes_atomically(folder / name, content)
    code = {str(run.provenance.get("code_hash")): run.provenance.get("code_files", {}) for run in runs}
    hashes = {run_id: {name: _hash(content) for name, content in sorted(contents[run_id].items())} for run_id in sorted(contents)}
    write_json_atomically(folder / KEPT, {"runs": hashes, "code_files": dict(sorted(code.items()))})
    return [*(folder / name for name in files), folder / KEPT]


def slim_files(run: Run) -> dict[str, bytes]:
    """Name -> content of what is kept of a run; ValueError if a file of it is damaged."""
    files = {name: (run.path / name).read_bytes() for name in AS_THEY_ARE if (run.path / name).is_file()}
    files["provenance.json"] = (json.dumps(kept_provenance(run), indent=1) + "\n").encode()
    files[f"{METRICS}.gz"] = gzip.compress(metrics_bytes(run.path), mtime=0)
    if arrays := read_arrays(run.path / "diagnostics.npz"):
        files["diagnostics.npz"] = _npz({name: array for name, array in arrays.items() if _is_drawn(name)})
    if (samples := read_samples(run.path)) is not None:
        files["samples.npz"] = _npz({"arr_0": samples[:NUM_SAMPLES]})
    if (trajectory := read_trajectory(run.path)) is not None:
        per_image = {name: getattr(trajectory, name)[:, :NUM_TRAJECTORIES] for name in ("images", "predicted")}
        files["trajectory.npz"] = _npz({**per_image, "times": trajectory.times, "labels": trajectory.labels[:NUM_TRAJECTORIES]})
    return files


def read_real_images(folder: Path) -> RealImages | None:
    """What was kept of the data; None if nothing was."""
    arrays = read_arrays(folder / REAL_IMAGES)
    return RealImages(arrays.get("images"), [str(name) for name in arrays["class_names"]]) if arrays else None


def changes(folder: Path) -> list[str]:
    """One line for each kept file that is gone or changed, and for each that was never kept; none where nothing was kept."""
    kept: Mapping[str, Mapping[str, str]] = read_json(folder / KEPT, dict).get("runs", {})
    if not kept:
        return []
    lines = []
    for run_id, files in kept.items():
        place = folder / RUNS / run_id
        if not place.is_dir():
            lines.append(f"{place} is missing")
            continue
        for name, known in files.items():
            if not (place / name).is_file():
                lines.append(f"{place / name} is missing")
            elif _hash((place / name).read_bytes()) != known:
                lines.append(f"{place / name} is not as it was kept")
    there = [path for path in sorted((folder / RUNS).rglob("*")) if path.is_file()]
    known_paths = set(_kept_paths(folder))
    return lines + [f"{path} is not among what was kept" for path in there if path not in known_paths]


def _kept_paths(folder: Path) -> list[Path]:
    kept: dict[str, Any] = read_json(folder / KEPT, dict).get("runs", {})
    return [folder / RUNS / Path(run_id).name / Path(name).name for run_id, files in kept.items() for name in files]


def _is_drawn(name: str) -> bool:
    diagnostic, _, part = name.partition("/")
    return part != "history" or diagnostic in DRAWN_OVER_TRAINING


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Equal arrays give equal bytes."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
