"""Does Remix-DiT mix as its released code does, and refuse what that code silently gets wrong?"""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NUM_TIMESTEPS,
    TINY,
    assert_close,
    assert_gradients,
    batch,
    block_outputs,
    golden,
    golden_interval,
    golden_method,
    tiny,
)
from torch.utils._python_dispatch import TorchDispatchMode

from bench.diffusion import guide
from bench.intervals import interval_of
from methods.remix_dit import RemixDiT, draw_logits

NAME = "remix_b2e10"


def test_outputs_and_guided_outputs_are_those_of_the_released_code():
    tensors, _ = golden(NAME)
    method = golden_method(NAME).requires_grad_(False)
    interval = golden_interval(method, NAME)
    x, t, y = (tensors[name] for name in "xty")
    assert_close(method.specialise(interval)(x, t, y), tensors["out_eval"])
    outputs = block_outputs(method, lambda: method(x, t, y, interval))
    for index, output in enumerate(outputs):
        assert_close(output, tensors[f"hid.block{index}"])
    denoiser = method.specialise(golden_interval(method, NAME, "cfg_t"))
    assert_close(guide(denoiser, tensors["cfg_x"], tensors["cfg_t"], tensors["cfg_y"], 1.5, 3), tensors["out_cfg"])


def test_coefficients_and_prior_are_those_of_the_released_code():
    tensors, _ = golden(NAME)
    method = golden_method(NAME).requires_grad_(False)
    assert_close(method.coefficients(), tensors["coeffs"], 1e-6)
    assert torch.equal(F.one_hot(method.prior_basis, 2).float(), tensors["prior"])
    assert_close(F.cross_entropy(method.logits, method.prior_basis, reduction="none"), tensors["prior_loss"], 1e-6)


def test_training_pass_is_that_of_the_released_code():
    tensors, _ = golden(NAME)
    method = golden_method(NAME, prior_weight=0.1, prior_annealing="constant")
    prediction = method(tensors["x"], tensors["t"], tensors["y"], golden_interval(method, NAME))
    assert_close(prediction.output, tensors["out_train"])
    assert_close(method.prior_loss(), tensors["loss_aux"], 1e-6)
    total = prediction.output.square().mean() + prediction.penalties["mixing_prior"]
    assert_close(total, tensors["loss_total"], 1e-6)
    total.backward()
    assert_gradients(method, NAME)


def test_batch_across_intervals_is_refused_and_its_parts_are_right():
    tensors, facts = golden(NAME)
    method = golden_method(NAME).requires_grad_(False)
    x, y, t = tensors["x"], tensors["y"], tensors["span.t"]
    with pytest.raises(ValueError, match="split the batch by interval"):
        method(x, t, y, interval_of(int(t[0]), method.intervals))
    for i in range(len(t)):
        interval = interval_of(int(t[i]), method.intervals)
        assert interval.index == tensors["span.model_id"][i]
        output = method(x[i : i + 1], t[i : i + 1], y[i : i + 1], interval).output
        assert_close(output, tensors["span.out_eval_one_by_one"][i : i + 1])
    assert facts["span_batched_vs_one_by_one_maxdiff"] > 0.01  # what the released code gets wrong


def test_copies_of_one_dense_network_equal_it():
    tensors, _ = golden("remix_from_dit")
    dense = golden_method("dit").requires_grad_(False)
    method = RemixDiT(dense.network.shape, bases=4, experts=8)
    method.load_dense(dense.network.state_dict())
    with torch.no_grad():
        method.logits.copy_(tensors["coefficients.weight"])
    assert torch.equal(method.network.blocks[0].attn.qkv.weight, tensors["state.blocks.0.attn.qkv.weight"])
    assert torch.equal(method.network.blocks[0].attn.qkv.bias, tensors["state.blocks.0.attn.qkv.bias"])
    interval = golden_interval(method, "remix_from_dit")
    output = method.specialise(interval)(tensors["x"], tensors["t"], tensors["y"])
    assert_close(output, tensors["out_eval"], 1e-6)
    assert_close(output, golden("dit")[0]["out_eval"], 1e-6)
    same, _ = golden("dit")
    denoiser = method.specialise(interval_of(int(same["cfg_t"][0]), method.intervals))
    assert_close(guide(denoiser, same["cfg_x"], same["cfg_t"], same["cfg_y"], 1.5, 3), tensors["out_cfg"], 1e-6)


@pytest.mark.parametrize("variant", ["remix_dit", "remix_dit local", "remix_dit one_hot"])
def test_every_expert_of_identical_bases_is_dense(variant):
    dense, method = tiny("dense").requires_grad_(False), tiny(variant).requires_grad_(False)
    method.load_dense(dense.network.state_dict())
    for interval in method.intervals:
        x, t, y = batch(interval)
        assert_close(method(x, t, y, interval).output, dense.network(x, t, y), 1e-5)


def test_raw_coefficients_that_sum_to_one_start_from_dense_and_others_scale():
    dense = tiny("dense").requires_grad_(False)
    method = RemixDiT(TINY, num_timesteps=NUM_TIMESTEPS, bases=3, experts=4, mixer="raw").requires_grad_(False)
    method.load_dense(dense.network.state_dict())
    interval = method.intervals[1]
    x, t, y = batch(interval)
    assert_close(method(x, t, y, interval).output, dense.network(x, t, y), 1e-5)
    method.logits.mul_(2)
    assert_close(method.block_coefficients(interval).sum(dim=1), torch.full((TINY.depth,), 2.0))
    assert (method(x, t, y, interval).output - dense.network(x, t, y)).abs().max() > 1e-3
    assert method(x, t, y, interval).penalties == {}


def test_one_hot_expert_is_its_prior_basis():
    method = tiny("remix_dit one_hot").requires_grad_(False)
    interval = method.intervals[2]
    expert = method.specialise(interval)
    chosen = int(method.prior_basis[2])
    assert torch.equal(expert.blocks[1].mlp.fc1.weight, method.network.blocks[1].mlp.fc1.weight[chosen])
    assert all(p is not method.logits for group in method.param_groups(1e-3) for p in group["params"])


def test_local_coefficients_mix_every_block_by_its_own():
    method = tiny("remix_dit local").requires_grad_(False)
    interval = method.intervals[1]
    expert = method.specialise(interval)
    for index, block in enumerate(method.network.blocks):
        mixing = method.logits[1, index].softmax(dim=0)
        expected = sum(c * w for c, w in zip(mixing, block.attn.proj.weight, strict=True))
        assert_close(expert.blocks[index].attn.proj.weight, expected, 1e-6)
    assert not torch.equal(method.block_coefficients(interval)[0], method.block_coefficients(interval)[1])


@pytest.mark.parametrize(
    ("bases", "experts", "num_timesteps"), [(2, 7, 1000), (4, 3, 1000), (5, 2, 10), (3, 1000, 1000), (1, 1, 4)]
)
@pytest.mark.parametrize("coefficients", ["global", "local"])
def test_any_number_of_bases_and_experts(bases, experts, num_timesteps, coefficients):
    method = RemixDiT(TINY, num_timesteps=num_timesteps, bases=bases, experts=experts, coefficients=coefficients)
    assert method.coefficients().shape[0] == experts
    assert method.prior_basis.tolist() == [e * bases // experts for e in range(experts)]
    for t in {0, num_timesteps // 2, num_timesteps - 1}:
        interval = interval_of(t, method.intervals)
        prediction = method(torch.randn(1, 2, 4, 4), torch.tensor([t]), torch.tensor([0]), interval)
        assert prediction.penalties["mixing_prior"].isfinite()


@pytest.mark.parametrize("experts", [4, 8, 20, 1000])
def test_where_experts_divide_the_timesteps_the_expert_is_the_published_one(experts):
    intervals = RemixDiT(TINY, bases=2, experts=experts).intervals
    for t in range(1000):
        assert t in intervals[t * experts // 1000]


@pytest.mark.parametrize("experts", [3, 7, 11, 999])
def test_elsewhere_every_timestep_still_has_one_expert(experts):
    """The released `t // (T // E)` runs past the last expert here."""
    intervals = RemixDiT(TINY, bases=2, experts=experts).intervals
    assert [sum(t in i for i in intervals) for t in range(1000)] == [1] * 1000


def test_logits_start_near_their_prior():
    torch.manual_seed(0)
    prior = torch.arange(1000) * 4 // 1000
    logits = draw_logits(prior, 4)
    torch.manual_seed(0)
    drawn = torch.randn(1000, 4)
    assert_close(logits, drawn + 3 * drawn.std() * F.one_hot(prior, 4))
    assert (logits.argmax(dim=1) == prior).float().mean() > 0.9


@pytest.mark.parametrize(
    ("annealing", "weights"), [("linear", (1e-4, 0.5e-4, 0)), ("constant", (1e-4,) * 3), ("released", (2e-4, 1.5e-4, 1e-4))]
)
def test_prior_weight_over_the_run(annealing, weights):
    method = tiny("remix_dit", prior_annealing=annealing)
    interval = method.intervals[0]
    for progress, weight in zip((0.0, 0.5, 1.0), weights, strict=True):
        penalty = method(*batch(interval), interval, progress).penalties["mixing_prior"]
        assert_close(penalty, weight * method.prior_loss())


def test_every_basis_starts_as_a_linear_of_its_own():
    torch.manual_seed(0)
    method = RemixDiT(TINY, bases=3, experts=3)
    for linear in method.network.blocks[0].bases().values():
        bound = (6 / sum(linear.weight.shape[1:])) ** 0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        assert not torch.equal(linear.weight[0], linear.weight[1])


def test_specialised_expert_costs_what_dense_costs():
    method, dense = tiny("remix_dit"), tiny("dense")
    expert = method.specialise(method.intervals[0])
    assert sum(p.numel() for p in expert.parameters()) == sum(p.numel() for p in dense.parameters())
    assert method.num_active_parameters() == dense.num_active_parameters()


class Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += "_to_copy" in str(function)
        return function(*arguments, **(keywords or {}))


@torch.no_grad()
def test_weights_of_a_specialised_expert_are_cast_once_for_all_steps_as_the_dense_ones_are():
    counts = []
    for method in (tiny("dense"), tiny("remix_dit")):
        interval = method.intervals[0]
        denoiser, (x, t, y) = method.specialise(interval), batch(interval)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(2):
                with Casts() as casts:
                    denoiser(x, t, y)
                counts.append(casts.count)
    first, second = counts[:2]
    assert counts == [first, second] * 2 and first > second + 20


def test_coefficients_have_their_own_learning_rate():
    method = tiny("remix_dit", coefficient_lr=0.5)
    groups = method.param_groups(1e-3)
    assert [group["lr"] for group in groups] == [1e-3, 0.5]
    assert groups[1]["params"][0] is method.logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "mean"}, "mixer"),
        ({"bases": 0}, "bases is 0"),
        ({"experts": 25}, "25 intervals"),
        ({"coefficients": "x"}, "coef"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RemixDiT(TINY, num_timesteps=NUM_TIMESTEPS, **options)
