"""Which tensors do the authors' checkpoints hold, under which names and shapes, and where do they live in our networks?

One `Row` per kind of tensor. `{i}` in a name counts the blocks, `{j}` the experts of a block; a dimension is a number
or the name of a size (`3*width`). Sizes are read from the tensors themselves. Where several released tensors have one
name of ours (the experts of DiT-MoE), ours is their stack, in the order of the rows.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Sizes = dict[str, int]


class Row(NamedTuple):
    released: str
    ours: str  # empty: a constant of the released code, which a checkpoint may hold or not
    dimensions: str
    group: str = ""  # rows of one group may be absent, but only together


def linear(released: str, ours: str, dimensions: str, group: str = "") -> tuple[Row, Row]:
    """A weight of the given dimensions and its bias, which lacks the last one."""
    return (
        Row(f"{released}.weight", f"{ours}.weight", dimensions, group),
        Row(f"{released}.bias", f"{ours}.bias", dimensions.rpartition(" ")[0], group),
    )


ENDS = (
    Row("pos_embed", "network.positions", "1 tokens width", "positions"),
    Row("x_embedder.proj.weight", "network.patch_embedding.proj.weight", "width channels patch patch"),
    Row("x_embedder.proj.bias", "network.patch_embedding.proj.bias", "width"),
    *linear("t_embedder.mlp.0", "network.time_embedding.fc1", "width 256"),
    *linear("t_embedder.mlp.2", "network.time_embedding.fc2", "width width"),
    Row("y_embedder.embedding_table.weight", "network.label_embedding.weight", "labels width"),
    *linear("final_layer.linear", "network.final.linear", "output width"),
    *linear("final_layer.adaLN_modulation.1", "network.final.modulation", "2*width width"),
)


def block(ours: str = "network.blocks.{i}", bases: str = "") -> tuple[Row, ...]:
    """The rows of a block without its MLP; `bases` is the dimension that stacks the attention's linears, if any."""
    return (
        *linear("blocks.{i}.attn.qkv", f"{ours}.attn.qkv", f"{bases}3*width width"),
        *linear("blocks.{i}.attn.proj", f"{ours}.attn.proj", f"{bases}width width"),
        *linear("blocks.{i}.adaLN_modulation.1", f"{ours}.modulation", "6*width width"),
    )


def mlp(ours: str = "network.blocks.{i}", bases: str = "") -> tuple[Row, ...]:
    return (
        *linear("blocks.{i}.mlp.fc1", f"{ours}.mlp.fc1", f"{bases}hidden width"),
        *linear("blocks.{i}.mlp.fc2", f"{ours}.mlp.fc2", f"{bases}width hidden"),
    )


MIXTURE = (
    Row("blocks.{i}.moe.gate.weight", "network.blocks.{i}.mlp.router.weight", "experts width"),
    Row("blocks.{i}.moe.experts.{j}.gate_proj.weight", "network.blocks.{i}.mlp.weight_in", "hidden width"),
    Row("blocks.{i}.moe.experts.{j}.up_proj.weight", "network.blocks.{i}.mlp.weight_in", "hidden width"),
    Row("blocks.{i}.moe.experts.{j}.down_proj.weight", "network.blocks.{i}.mlp.weight_out", "width hidden"),
    Row(
        "blocks.{i}.moe.shared_experts.gate_proj.weight", "network.blocks.{i}.mlp.shared.gate_up.weight", "shared width", "shared"
    ),
    Row("blocks.{i}.moe.shared_experts.up_proj.weight", "network.blocks.{i}.mlp.shared.gate_up.weight", "shared width", "shared"),
    Row("blocks.{i}.moe.shared_experts.down_proj.weight", "network.blocks.{i}.mlp.shared.down.weight", "width shared", "shared"),
)

ROWS: dict[str, tuple[Row, ...]] = {
    "dit": (*ENDS, *block(), *mlp()),
    "dtr": (*ENDS, *block(), *mlp(), Row("blocks.{i}.routing._unit_mapping", "", "timesteps width")),
    "switch_dit": (
        *ENDS,
        *block("network.blocks.{i}.block"),
        *mlp("network.blocks.{i}.block"),
        *linear("routers.{i}.f_gate.1", "network.blocks.{i}.gate.linear", "experts width"),
        Row("routers.{i}.experts.w", "network.blocks.{i}.expert_weight", "experts width width"),  # (expert, in, out)
        Row("routers.{i}.experts.b", "network.blocks.{i}.expert_bias", "experts width"),
        Row("full_time", "", "timesteps"),
        Row("prior._unit_mapping", "", "timesteps slots"),
    ),
    "dit_moe": (*ENDS, *block(), *MIXTURE),
    "remix_dit": (
        *ENDS,
        *block(bases="bases "),
        *mlp(bases="bases "),
        Row("coefficients.weight", "logits", "experts bases"),
    ),
}


def expand(rows: tuple[Row, ...], num_blocks: int, num_experts: int) -> Iterator[Row]:
    """The rows of every block and of every expert, `{i}` and `{j}` filled in; an expert's rows stay together."""
    yield from (row for row in rows if "{i}" not in row.released)
    for i in range(num_blocks):
        of_block = [
            row._replace(released=row.released.replace("{i}", str(i)), ours=row.ours.replace("{i}", str(i)))
            for row in rows
            if "{i}" in row.released
        ]
        yield from (row for row in of_block if "{j}" not in row.released)
        for j in range(num_experts):
            yield from (row._replace(released=row.released.replace("{j}", str(j))) for row in of_block if "{j}" in row.released)


def resolve(layout: str, state: Mapping[str, Tensor], num_timesteps: int) -> tuple[Sizes, list[Row]]:
    """The sizes of the checkpoint `state` and the rows that it holds.

    Raises one ValueError that lists every unknown, missing and misshaped tensor.
    """
    sizes = infer_sizes(layout, state, num_timesteps)
    rows = list(expand(ROWS[layout], sizes["blocks"], sizes.get("experts", 1)))
    groups = {row.group for row in rows if row.group and row.released in state}
    expected = {row.released for row in rows}
    needed = [row for row in rows if row.ours and (not row.group or row.group in groups)]
    unfit = {
        "unknown": [name for name in state if name not in expected],
        "missing": [row.released for row in needed if row.released not in state],
        "misshaped": [
            f"{row.released} {describe(state[row.released])} where ({', '.join(row.dimensions.split())}) = {wanted} is expected"
            for row in rows
            if row.released in state and (wanted := misfit(row, state[row.released], sizes))
        ],
    }
    if any(unfit.values()):
        problems = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in unfit.items() if names)
        raise ValueError(
            f"the checkpoint does not have the layout {layout!r} ({problems}): "
            f"choose the layout it was released in, one of {', '.join(ROWS)}, or repair these tensors"
        )
    return sizes, [row for row in rows if row.released in state]


def infer_sizes(layout: str, state: Mapping[str, Tensor], num_timesteps: int) -> Sizes:
    """Every size as most tensors have it, so that a few missing or misshaped ones cannot mislead; unknowable ones are absent."""
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    num_blocks = num_named_experts = 0
    for row in ROWS[layout]:
        if not row.ours:
            continue
        pattern = re.compile(re.escape(row.released).replace(r"\{i\}", r"(?P<i>\d{1,4})").replace(r"\{j\}", r"(?P<j>\d{1,4})"))
        for name, tensor in state.items():
            if not (match := pattern.fullmatch(name)):
                continue
            place = match.groupdict()
            num_blocks = max(num_blocks, int(place.get("i", -1)) + 1)
            num_named_experts = max(num_named_experts, int(place.get("j", -1)) + 1)
            for dimension, length in zip_dimensions(row, tensor):
                factor, size = split(dimension)
                if size and length and length % factor == 0:
                    votes[size][length // factor] += 1
    if num_named_experts:
        votes["experts"][num_named_experts] += 1
    sizes = {size: counts.most_common(1)[0][0] for size, counts in votes.items()}
    sizes |= {"blocks": max(num_blocks, 1), "timesteps": num_timesteps}
    if {"channels", "patch"} <= sizes.keys():
        pixel_rows = sizes["channels"] * sizes["patch"] ** 2
        plausible = [rows for rows, _ in votes["output"].most_common() if rows in (pixel_rows, 2 * pixel_rows)]
        sizes["output"] = plausible[0] if plausible else 2 * pixel_rows
    return sizes


def zip_dimensions(row: Row, tensor: Tensor) -> list[tuple[str, int]]:
    dimensions = row.dimensions.split()
    return list(zip(dimensions, tensor.shape, strict=True)) if len(dimensions) == tensor.dim() else []


def split(dimension: str) -> tuple[int, str]:
    """`3*width` -> (3, width); `256` -> (256, "")."""
    if dimension.isdigit():
        return int(dimension), ""
    factor, _, size = dimension.rpartition("*")
    return int(factor or 1), size


def misfit(row: Row, tensor: Tensor, sizes: Sizes) -> str:
    """What the shape or type should have been, or nothing if it fits. A size that no tensor tells fits everything."""
    wanted: list[int | str] = []
    for dimension in row.dimensions.split():
        factor, size = split(dimension)
        wanted.append(factor * sizes.get(size, 0) or "any" if size else factor)
    expected = f"({', '.join(map(str, wanted))})"
    if len(wanted) != tensor.dim():
        return expected
    if any(not length or w not in ("any", length) for w, length in zip(wanted, tensor.shape, strict=True)):
        return expected
    if row.released == "pos_embed" and math.isqrt(tensor.shape[1]) ** 2 != tensor.shape[1]:
        return f"{expected} with a square number of tokens"
    if row.ours and not tensor.is_floating_point():
        return f"{expected} of a floating-point type"
    return ""


def describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} of {tensor.dtype}"


def to_ours(rows: list[Row], released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released tensors under our names, several of one name stacked on a new leading axis."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for row in rows:
        if row.ours:
            parts[row.ours].append(released[row.released])
    return {name: tensors[0] if len(tensors) == 1 else torch.stack(tensors) for name, tensors in parts.items()}


def to_theirs(rows: list[Row], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our names under the released ones: copies, stacked ones taken apart."""
    count = Counter(row.ours for row in rows)
    place: Counter[str] = Counter()
    theirs = {}
    for row in rows:
        if row.ours in ours:
            whole = ours[row.ours].detach()
            if count[row.ours] > 1 or whole.dim() > len(row.dimensions.split()):  # stacked, be it of one
                whole = whole.reshape(count[row.ours], -1, whole.shape[-1])[place[row.ours]]
            theirs[row.released] = whole.clone()
            place[row.ours] += 1
    return theirs
