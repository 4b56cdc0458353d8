"""How do the authors' checkpoints become our methods, and our methods their checkpoints?

The released names and shapes are in `methods/released_layouts.py`. Sizes are inferred from the tensors; what they
cannot tell (heads, and options such as top_k) is given, with the released values as defaults.
"""

import argparse
import math
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bench.method import Method
from methods.backbone import Shape
from methods.dense import Dense
from methods.dit_moe import DiTMoE
from methods.dtr import DTR
from methods.released_layouts import ROWS, Row, Sizes, expand, resolve, to_ours, to_theirs
from methods.remix_dit import RemixDiT
from methods.switch_dit import SwitchDiT


class Layout(NamedTuple):
    """The method of a layout, which of its options the tensors tell, and which are given."""

    method: type[Method]
    inferred: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


LAYOUTS = {
    "dit": Layout(Dense),
    "dtr": Layout(DTR, (), ("alpha", "beta", "routing", "routing_seed")),
    "switch_dit": Layout(SwitchDiT, ("experts",), ("top_k", "prior_weight")),
    "dit_moe": Layout(DiTMoE, ("experts", "shared_width"), ("top_k", "renormalise", "balance_weight", "balance_scope")),
    "remix_dit": Layout(RemixDiT, ("experts", "bases"), ("mixer", "coefficient_lr", "prior_weight", "prior_annealing")),
}


def load_released(
    layout: str,
    state_dict: Mapping[str, Any],
    *,
    num_heads: int,
    num_timesteps: int = 1000,
    input_size: int | None = None,
    **options: Any,
) -> Method:
    """The method that a released checkpoint holds, in float32 on the CPU.

    `state_dict` holds the tensors, or holds them under `ema` (preferred) or `model`. `layout` is dit, dtr, switch_dit,
    dit_moe or remix_dit. `input_size` is needed only where `pos_embed` is absent. Options are the method's own:
    alpha, beta, routing (dtr); top_k (switch_dit, dit_moe); mixer (remix_dit) ... Raises ValueError for an unknown layout
    or option, for tensors that do not fit (one error lists them all), and for options that contradict a stored table.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"the layout {layout!r} is not known: choose one of {', '.join(LAYOUTS)}")
    known = LAYOUTS[layout]
    if unknown := [name for name in options if name not in known.options]:
        raise ValueError(
            f"the layout {layout!r} has no option {', '.join(unknown)}: "
            f"its options are {', '.join(('input_size', *known.options))}; all sizes are read from the tensors"
        )
    state = bare_state(state_dict)
    sizes, rows = resolve(layout, state, num_timesteps)
    inferred: dict[str, Any] = {name: sizes[name] for name in known.inferred if name in sizes}
    if "shared_width" in known.inferred:
        inferred["shared_width"] = exact_ratio(sizes.get("shared", 0), sizes["width"])
    shape = infer_shape(sizes, num_heads, input_size)
    method = known.method(shape, num_timesteps=num_timesteps, **inferred, **options)  # type: ignore[call-arg]
    own = method.state_dict()
    method.load_state_dict(own | {name: tensor.reshape(own[name].shape) for name, tensor in to_ours(rows, state).items()})
    if isinstance(method, DTR) and method.routing == "random":
        take_random_tables(method, state)
    check_constants(method, rows, state)
    return method


def to_released(method: Method) -> dict[str, Tensor]:
    """The method's checkpoint in its authors' layout, the released code's constant tables included; copies.

    Raises ValueError for a method, or options of one, that no released code has.
    """
    layout = next((name for name, known in LAYOUTS.items() if type(method) is known.method), None)
    if layout is None:
        raise ValueError(
            f"{type(method).__name__} has no released layout: methods with one are "
            f"{', '.join(known.method.__name__ for known in LAYOUTS.values())}"
        )
    rows, state = method_rows(layout, method), method.state_dict()
    theirs = to_theirs(rows, state) | constants(method, rows)
    homeless = state.keys() - {row.ours for row in rows} - {"masks"}  # the masks are among the constants
    if homeless or (isinstance(method, RemixDiT) and method.logits.dim() != 2):
        raise ValueError(
            f"this {type(method).__name__} has no released layout ({', '.join(sorted(homeless)) or 'coefficients per block'}): "
            "only SwiGLU experts and global coefficients can be written"
        )
    return theirs


def read_weights(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU: safetensors, or what `torch.save` writes. No code in it is executed.

    Raises ValueError if the file is missing, damaged, of another kind, or holds objects other than tensors and plain data.
    """
    try:
        with Path(path).open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ValueError(f"the weights {path} cannot be read ({error.strerror}): give the path of a checkpoint file") from error
    if start[8:] != b"{" and start[:4] != b"PK\x03\x04":
        raise ValueError(f"the file {path} holds no weights: give one in safetensors form or one that torch.save wrote")
    try:
        if start[8:] == b"{":
            return dict(load_file(path))
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their arguments: plain data
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the weights {path} hold objects that only running code could load, which is never done: "
            "save the state dict alone, with safetensors or torch.save"
        ) from error
    except (SafetensorError, zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"the weights {path} are damaged: fetch or copy the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"the file {path} holds a {type(content).__name__}: give one that holds a state dict")
    return content


def bare_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint: those under `ema`, else under `model`, else its own."""
    inner = next((content[name] for name in ("ema", "model") if isinstance(content.get(name), Mapping)), content)
    if foreign := [str(name) for name, value in inner.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"the checkpoint holds entries that are not tensors ({', '.join(foreign)}): "
            "give a state dict, or a checkpoint with one under 'ema' or 'model'"
        )
    return dict(inner)


def infer_shape(sizes: Sizes, num_heads: int, input_size: int | None) -> Shape:
    if "tokens" in sizes:
        stored = math.isqrt(sizes["tokens"]) * sizes["patch"]
        if input_size not in (None, stored):
            raise ValueError(f"input_size is {input_size}, but pos_embed is for {stored}: give {stored} or leave it out")
        input_size = stored
    elif input_size is None:
        raise ValueError("the checkpoint has no pos_embed, which tells the input's size: give input_size, for example 32")
    return Shape(
        depth=sizes["blocks"],
        width=sizes["width"],
        num_heads=num_heads,
        patch_size=sizes["patch"],
        input_size=input_size,
        channels=sizes["channels"],
        num_classes=sizes["labels"] - 1,  # the last row: no label
        learn_sigma=sizes["output"] == 2 * sizes["channels"] * sizes["patch"] ** 2,
        mlp_ratio=exact_ratio(sizes["hidden"], sizes["width"]),
    )


def exact_ratio(hidden: int, width: int) -> float:
    """The ratio r for which `int(width * r)` is `hidden`, though floating point may round the quotient down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def method_rows(layout: str, method: Method) -> list[Row]:
    """The rows of a method's own checkpoint."""
    state = method.state_dict()
    rows = expand(ROWS[layout], len(method.network.blocks), getattr(method, "experts", 0))  # type: ignore[arg-type, union-attr]
    return [row for row in rows if row.ours in state or not row.ours]


def constants(method: Method, rows: list[Row]) -> dict[str, Tensor]:
    """The tables that the released code stores beside the weights: DTR's masks, Switch-DiT's timesteps and targets."""
    tables: dict[str, Tensor] = {}
    for name in (row.released for row in rows if not row.ours):
        if isinstance(method, DTR):
            masks = method.masks  # (1 or L, T, D)
            tables[name] = masks[int(name.split(".")[1]) if len(masks) > 1 else 0].float()
        elif isinstance(method, SwitchDiT):
            tables[name] = torch.arange(method.num_timesteps) if name == "full_time" else method.target.float()
    return tables


def take_random_tables(method: DTR, state: Mapping[str, Tensor]) -> None:
    """Random routing: the checkpoint's own subset per block and timestep, if it stores them."""
    names = [f"blocks.{i}.routing._unit_mapping" for i in range(len(method.network.blocks))]
    absent = [name for name in names if name not in state]
    if 0 < len(absent) < len(names):
        raise ValueError(f"the checkpoint lacks the random masks {', '.join(absent)}: give those of all blocks or of none")
    if not absent:
        method.masks.copy_(torch.stack([state[name] for name in names]) != 0)


def check_constants(method: Method, rows: list[Row], state: Mapping[str, Tensor]) -> None:
    """ValueError if a stored table is not the one that the options give."""
    for name, table in constants(method, rows).items():
        if state[name].shape != table.shape or not torch.equal(state[name].to(table.dtype), table):
            raise ValueError(
                f"the stored table {name} is not the one of {settings(method)}: "
                "give the options that the checkpoint was trained with"
            )


def settings(method: Method) -> str:
    """The options that a stored table depends on, in words."""
    if isinstance(method, DTR):
        if method.routing == "random":
            return "routing='random', which holds zeros and ones only"
        return f"alpha={method.alpha}, beta={method.beta} and routing='sliding'"
    return f"top_k={getattr(method, 'top_k', None)} and num_timesteps={getattr(method, 'num_timesteps', None)}"
