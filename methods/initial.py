"""How does a configuration become a network with its initial weights?"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from bench.method import Method
from methods.backbone import Shape


def option_defaults(method: type[Method]) -> dict[str, Any]:
    """A method's options and their defaults, whose types are the options' types: the keywords of its constructor."""
    options = {}
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "num_timesteps":
            default = parameter.default
            if default is parameter.empty or default is None:
                raise TypeError(
                    f"option {parameter.name} of {method.__name__} needs a default of its type: int, float, bool or str"
                )
            is_float = parameter.annotation in (float, "float") and isinstance(default, int)
            options[parameter.name] = float(default) if is_float else default  # `gamma: float = 1` takes 0.5 too
    return options


def build(
    method: type[Method],
    model: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    seed: int,
    num_timesteps: int,
    **dimensions: Any,
) -> Method:
    """A method with initial weights drawn from `seed` alone.

    `model` holds the backbone's settings, with a named `size` or dimensions; `dimensions` are input_size, channels and
    num_classes of the data. Raises ValueError for impossible sizes and options.
    """
    shape = dict(model)
    size = shape.pop("size")
    if size:
        kept = {key: shape[key] for key in ("mlp_ratio", "learn_sigma")}
        backbone = Shape.of_size(size, **kept, **dimensions)
    else:
        backbone = Shape(**shape, **dimensions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return method(backbone, num_timesteps=num_timesteps, **options)
