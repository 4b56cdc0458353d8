"""Do scores keep the hash that they were made under, and does what came later count only where it is set?"""

import json
from pathlib import Path

import pytest

from bench.config import ONLY_WHEN_SET, DataConfig, EvaluationConfig
from bench.data import DataSource, load_data
from bench.job import make_config, read_config
from bench.protocol import differences, protocol_of
from bench.runs import Run

OF_THE_DEFAULTS = "a29f53419b"  # as the digits runs were scored, before there was anything to leave unset
OF_TORCH_FIDELITY = "0.4.0"


@pytest.fixture(scope="module")
def data() -> DataSource:
    return load_data(DataConfig())


def test_the_defaults_have_the_hash_that_they_had(data: DataSource) -> None:
    protocol = protocol_of(EvaluationConfig(), data)
    if protocol.torch_fidelity == OF_TORCH_FIDELITY:  # another version is another protocol
        assert protocol.hash == OF_THE_DEFAULTS
    assert not set(ONLY_WHEN_SET) & set(protocol.content)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"guidance_scale": 2.0, "guidance_start": 100}, ["guidance_start"]),
        ({"guidance_scale": 2.0, "guidance_start": 100, "guidance_stop": 700}, ["guidance_start", "guidance_stop"]),
        ({"guidance_scale": 2.0, "sampler": "dpm_solver"}, ["sampler", "solver"]),
        ({"guidance_scale": 2.0, "precision": "bf16"}, ["precision"]),
    ],
)
def test_what_is_set_counts_and_is_named(settings: dict[str, object], names: list[str], data: DataSource) -> None:
    plain, other = (protocol_of(EvaluationConfig(**kind), data) for kind in ({"guidance_scale": 2.0}, settings))
    assert plain.hash != other.hash and differences(plain, other) == names
    assert differences(json.loads(json.dumps(plain.content)), other) == names


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, True),
        ({"guidance_scale": 2.0, "guidance_start": 0}, True),
        ({"guidance_scale": 2.0, "guidance_start": 100}, False),
        ({"guidance_stop": 700}, False),
        ({"curve_every": 4}, True),  # no part of a protocol
    ],
)
def test_a_record_without_what_came_later_stands_for_it_unset(
    wanted: dict[str, object], expected: bool, data: DataSource, tmp_path: Path
) -> None:
    protocol = protocol_of(EvaluationConfig(guidance_scale=2.0), data)
    record = {"protocol_hash": protocol.hash, "protocol": protocol.content, "n": 500, "metrics": {}}
    (tmp_path / "eval.json").write_text(json.dumps([record]))
    assert Run(tmp_path).is_scored_under(wanted) == expected


def test_a_run_from_before_a_setting_of_scoring_or_system_was_there_can_be_read(tmp_path: Path) -> None:
    config = make_config({"seed": 3})
    lines = config.to_yaml().splitlines()
    later = ("guidance_start", "precision", "compile_sampling", "resident_gb")
    kept = [line for line in lines if line.strip().split(":")[0] not in later or line.startswith("  precision: fp32")]
    (tmp_path / "config.yaml").write_text("\n".join(kept) + "\n")
    assert read_config(tmp_path) == config
    (tmp_path / "config.yaml").write_text("\n".join(line for line in lines if "weight_decay" not in line) + "\n")
    with pytest.raises(ValueError, match=r"lacks train\.weight_decay"):
        read_config(tmp_path)
