"""How good was a run on its way? Keeps the averaged weights at places of training, to be scored once it is trained.

Comparisons at an equal budget of another kind (training FLOPs, device time) read a run at the checkpoint that the
budget reaches: `curve.json` holds a record for each place, under the run's protocol.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bench.files import read_json, write_bytes_atomically, write_json_atomically
from bench.runs import CURVE

WEIGHTS = "snapshots/weights-*.safetensors"


def keep_weights(folder: Path, module: nn.Module, place: dict[str, Any]) -> None:
    """The module's weights as they are, at a place of training (step, images_seen, train_flops, device_seconds)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    (folder / "snapshots").mkdir(exist_ok=True)
    content = save(tensors, {"place": json.dumps(place)})
    write_bytes_atomically(folder / "snapshots" / f"weights-{place['images_seen']:012d}.safetensors", content)


def kept_weights(folder: Path) -> list[Path]:
    """Earliest first."""
    return sorted(folder.glob(WEIGHTS))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and their place of training."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        place: dict[str, Any] = json.loads(file.metadata()["place"])
    return tensors, place


def is_on_curve(folder: Path, protocol_hash: str, step: int) -> bool:
    return any((record["protocol_hash"], record["step"]) == (protocol_hash, step) for record in read_json(folder / CURVE, list))


def add_to_curve(folder: Path, record: dict[str, Any], place: dict[str, Any]) -> None:
    """A record as in `eval.json`, with its place; in the order of training."""
    records = [*read_json(folder / CURVE, list), {**record, **place}]
    write_json_atomically(folder / CURVE, sorted(records, key=lambda each: (each["protocol_hash"], each["step"])))
