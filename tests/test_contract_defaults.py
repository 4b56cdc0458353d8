"""Do the parts of the contract that have defaults hold for every method: parameter groups, a dense start, diagnostics?"""

import numpy as np
import pytest
import torch
from helpers import NUM_TIMESTEPS, TINY, VARIANTS, assert_close, batch, tiny

from bench.intervals import Interval
from bench.method import Method, Probe
from methods import METHODS

FROM_DENSE = [
    variant
    for variant, (method, _) in VARIANTS.items()
    if METHODS[method].load_dense is not Method.load_dense and variant not in ("dit_moe", "dit_moe no shared")
]
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_groups_cover_every_trainable_parameter_once(variant):
    method = tiny(variant)
    groups = method.param_groups(lr=1e-3)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in method.parameters() if p.requires_grad}
    assert all(group["lr"] > 0 for group in groups)
    torch.optim.AdamW(groups)


@every_variant
def test_diagnostics_have_the_axes_they_claim(variant):
    method = tiny(variant)
    t = torch.arange(NUM_TIMESTEPS).repeat(2)
    x, _, y = batch(Interval(0, 0, NUM_TIMESTEPS), size=len(t))
    without, with_probe = method.diagnostics(), method.diagnostics(Probe(x, t, y))
    assert without.keys() <= with_probe.keys()
    options = VARIANTS[variant][1]
    lengths = {
        "block": TINY.depth,
        "channel": TINY.width,
        "expert": options.get("experts", getattr(method, "experts", None)),
        "basis": options.get("bases"),
    }
    for name, (axes, array) in with_probe.items():
        assert isinstance(array, np.ndarray), name
        assert len(axes) == array.ndim, name
        assert np.isfinite(array.astype(float)).all(), name
        for axis, length in zip(axes, array.shape, strict=True):
            assert length == lengths.get(axis, length), (name, axis)
            if axis == "timestep":
                assert NUM_TIMESTEPS % length == 0 or length == 20
    if "expert_usage" in with_probe:
        assert with_probe["expert_usage"][1].sum(axis=1) == pytest.approx(np.ones(TINY.depth), abs=1e-5)


def test_probe_that_misses_timesteps_leaves_gaps_and_no_error():
    method = tiny("dit_moe")
    x, _, y = batch(method.intervals[0])
    axes, routing = method.diagnostics(Probe(x, torch.zeros(6, dtype=torch.int64), y))["routing"]
    assert axes == ("block", "timestep", "expert")
    assert np.isfinite(routing[:, 0]).all()
    assert np.isnan(routing[:, 1:]).all()


@pytest.mark.parametrize("variant", FROM_DENSE)
def test_start_from_dense(variant):
    dense, method = tiny("dense", seed=7), tiny(variant)
    method.load_dense(dense.network.state_dict())
    if variant == "remix_dit raw":
        with torch.no_grad():
            method.logits.copy_(method.logits.softmax(dim=-1))
    for interval in method.intervals:
        x, t, y = batch(interval)
        output, expected = method(x, t, y, interval).output, dense.network(x, t, y)
        if METHODS[VARIANTS[variant][0]] is METHODS["dtr"]:
            method.masks.fill_(True)  # but for its masks, the dense network
            output = method(x, t, y, interval).output
        assert_close(output, expected, 1e-5)
    with torch.no_grad():
        dense.network.final.linear.weight.zero_()  # what was loaded is a copy
    assert method(x, t, y, interval).output.std() > 1e-3


@pytest.mark.parametrize("variant", ["dense", "multi_expert", "dtr", "switch_dit", "dit_moe gelu", "remix_dit"])
def test_dense_weights_that_do_not_fit_are_all_listed(variant):
    method = tiny(variant)
    state = tiny("dense").network.state_dict()
    del state["final.linear.bias"]
    state["label_embedding.weight"] = torch.zeros(5, TINY.width)
    state["oddity"] = torch.zeros(1)
    with pytest.raises(ValueError, match="the dense state does not fit") as error:
        method.load_dense(state)
    for part in ("unknown: oddity", "missing: final.linear.bias", "misshaped: label_embedding.weight (5, 16) where (4, 16)"):
        assert part in str(error.value)


def test_method_without_a_start_from_dense_says_so():
    with pytest.raises(ValueError, match="cannot start from a plain backbone"):
        Method().load_dense({})
