"""How do the tree of a YAML file and `key=value` settings become one run's configuration?

OmegaConf merges them and checks types; everything that is not allowed is refused in one sentence.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, make_dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bench.config import RunConfig

HELP = "`tsbench train --help` lists all settings"


def resolve(tree: Mapping[str, Any], overrides: Iterable[str], methods: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """A configuration from a tree (as read from YAML) and `key=value` overrides, with all defaults filled in.

    `methods` gives the name -> {option: default} of every method. Raises ValueError in one sentence for an unknown
    key, a value of the wrong type or one that is not allowed.
    """
    merged = _merge(OmegaConf.create(dict(tree)), OmegaConf.create({}))
    for override in overrides:
        merged = _merge(merged, _override(override))
    given = OmegaConf.to_container(merged)  # `${...}` stays text: it may point at a default
    assert isinstance(given, dict)
    _check_keys(given)
    name = given.get("method", next(iter(methods)))
    if name not in methods:
        raise ValueError(f"method {name!r} is not known: choose one of {', '.join(methods)}")
    merged.method, merged.options = name, _typed_options(name, methods[name], given.get("options") or {})
    config = _merge(_run_schema(), merged)
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(_one_sentence(error)) from None
    assert isinstance(resolved, RunConfig)
    for key, value in flat_settings(asdict(resolved)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}: give a finite number")
    return resolved


def flat_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's values under their full names, `train.lr` and the like."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= {f"{key}.{inner}": of_inner for inner, of_inner in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def _override(text: str) -> Any:
    if "=" not in text or text.startswith("="):
        raise ValueError(f"override {text!r} is not of the form key=value, for example train.lr=1e-3")
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"override {text!r} cannot be read ({_one_sentence(error)})") from None


def _check_keys(tree: dict[Any, Any]) -> None:
    """Refuse keys that are not settings, say which was meant or allowed, and values that are left open."""
    schema = asdict(RunConfig())
    for key, value in tree.items():
        section = schema.get(key)
        if isinstance(section, dict) and isinstance(value, dict):
            for inner in value:
                if key != "options" and inner not in section:
                    raise ValueError(f"there is no setting {key}.{inner}: {_meant(f'{key}.{inner}', schema, section)}")
        elif isinstance(section, dict) and value is not None:
            raise ValueError(f"{key} is {value!r}: give a mapping, or set single ones with {key}.NAME=VALUE")
        elif key not in schema:
            raise ValueError(f"there is no setting {key}: {_meant(str(key), schema, schema)}")
    for key, value in flat_settings(tree).items():
        if value == "???":  # OmegaConf's word for a value that is still to come
            raise ValueError(f"{key} is left open by ???: give a value")


def _meant(key: str, schema: dict[str, Any], section: dict[str, Any]) -> str:
    full_names = list(flat_settings(schema))
    same = [name for name in full_names if name.endswith(f".{key.rpartition('.')[2]}")]
    close = same or difflib.get_close_matches(key, full_names, 1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(section)}"


def _merge(base: Any, other: Any, prefix: str = "") -> Any:
    try:
        return OmegaConf.merge(base, other)
    except OmegaConfBaseException as error:
        raise ValueError(_one_sentence(error, prefix)) from None


def _typed_options(method: str, defaults: Mapping[str, Any], given: Any) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        allowed = f"choose from {', '.join(defaults)}" if defaults else "it has none at all"
        raise ValueError(f"method {method!r} has no option {', '.join(unknown)}: {allowed}")
    merged = _merge(_options_schema(tuple((key, type(value), value) for key, value in defaults.items())), given, "options.")
    try:
        return {str(key): value for key, value in merged.items()}
    except OmegaConfBaseException as error:
        raise ValueError(_one_sentence(error, "options.")) from None


@cache  # a suite has hundreds of configurations, and a merge leaves its parts as they are
def _run_schema() -> Any:
    return OmegaConf.structured(RunConfig)


@cache
def _options_schema(fields: tuple[tuple[str, type, Any], ...]) -> Any:
    return OmegaConf.structured(make_dataclass("Options", fields))


def _one_sentence(error: Exception, prefix: str = "") -> str:
    """The first line of OmegaConf's listing, with the full key."""
    lines = str(error).splitlines() or [type(error).__name__]
    line, key = lines[0], getattr(error, "full_key", None)
    return f"{prefix}{key} cannot be set so ({line}): {HELP}" if key else line
