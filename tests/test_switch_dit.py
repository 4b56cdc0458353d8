"""Does Switch-DiT gate, match and regularise as its released code does?"""

from types import SimpleNamespace

import pytest
import torch
from helpers import NUM_TIMESTEPS, TINY, assert_close, assert_gradients, batch, block_outputs, golden, golden_method, tiny
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench import switches
from bench.diffusion import guide
from methods.backbone import Shape
from methods.dense import Dense
from methods.switch_dit import Matching, SwitchDiT, jensen_shannon, match_columns, match_cost, target_slots


def test_outputs_and_guided_outputs_are_those_of_the_released_code():
    tensors, _ = golden("switch_dit")
    method = golden_method("switch_dit").requires_grad_(False)
    denoiser = method.specialise(method.intervals[0])
    assert_close(denoiser(tensors["x"], tensors["t"], tensors["y"]), tensors["out_eval"])
    assert_close(guide(denoiser, tensors["cfg_x"], tensors["cfg_t"], tensors["cfg_y"], 1.5, 4), tensors["out_cfg"])


def test_blocks_and_masks_are_those_of_the_released_code():
    tensors, _ = golden("switch_dit")
    method = golden_method("switch_dit").requires_grad_(False)
    x, t, y = (tensors[name] for name in "xty")
    outputs = block_outputs(method, lambda: method.denoise_and_route(x, t, y))
    tokens, time, _ = method.network.embed(x, t, y)
    for index, (block, output) in enumerate(zip(method.network.blocks, outputs, strict=True)):
        probabilities, gates = block.gate(time)
        assert_close(probabilities, tensors[f"gate_probs_batch.layer{index}"])
        assert_close(1 + block.deviation(tokens, gates), tensors[f"mask.layer{index}"])
        assert_close(output, tensors[f"hid.block{index}"])
        tokens = output


def test_gates_at_all_timesteps_are_those_of_the_released_code():
    tensors, _ = golden("switch_dit")
    method = golden_method("switch_dit").requires_grad_(False)
    probabilities, chosen = method.all_probabilities(), method.all_chosen()
    assert_close(method.network.time_embedding(torch.arange(1000)), tensors["hid.t_embedder"])
    for layer in range(3):
        assert_close(probabilities[:, layer], tensors[f"gate_probs_full.layer{layer}"])
        assert torch.equal(chosen[:, layer], (tensors[f"gate_top2_full.layer{layer}"] > 0).float())


def test_matching_is_that_of_the_released_code():
    tensors, facts = golden("switch_dit")
    method = golden_method("switch_dit").requires_grad_(False)
    target = method.target.float()
    cost = match_cost(method.all_chosen().flatten(1), target)
    assert torch.equal(cost, tensors["match_cost"])
    columns = match_columns(cost)
    assert cost[torch.arange(9), columns].sum() == facts["match_cost_optimum"]
    assert torch.equal(target[tensors["t"]], tensors["prior.active_mask"])
    assert cost[torch.arange(9), tensors["match_identity_order"]].sum() == facts["match_cost_optimum"]


def test_training_pass_is_that_of_the_released_code():
    tensors, facts = golden("switch_dit")
    method = golden_method("switch_dit")
    prediction = method(tensors["x"], tensors["t"], tensors["y"], method.intervals[0])
    assert_close(prediction.output, tensors["out_train"])
    divergence = prediction.penalties["diffusion_prior"]
    assert abs(divergence.item() - tensors["loss_aux"].item()) < 1e-7
    assert facts["jsd_invariance"]["min"] - 1e-7 < divergence.item() < facts["jsd_invariance"]["max"] + 1e-7
    assert (divergence.double() - tensors["jsd.by_seed"]).abs().max() < 1e-7
    total = prediction.output.square().mean() + divergence
    assert_close(total, tensors["loss_total"])
    total.backward()
    assert_gradients(method, "switch_dit")


def test_divergence_tells_its_constant_apart():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    exact = 0.5 * (0.5 * torch.tensor(2 / 3).log() + 0.5 * torch.tensor(2.0).log()) + 0.5 * torch.tensor(4 / 3).log()
    assert abs(jensen_shannon(p, q) - exact) < 1e-5
    assert abs(jensen_shannon(p, q) - exact) > 1e-8  # the constant inside the logarithms is there
    assert jensen_shannon(q, q) == 0
    assert_close(jensen_shannon(p, q), jensen_shannon(q, p))


@pytest.mark.parametrize(("depth", "experts", "top_k"), [(3, 3, 2), (12, 3, 2), (28, 3, 2), (28, 7, 3), (40, 16, 1)])
def test_target_has_exactly_the_active_slots_at_every_timestep(depth, experts, top_k):
    target = target_slots(1000, depth * experts, depth * top_k)
    assert (target.sum(dim=1) == depth * top_k).all()
    assert target[0, : depth * top_k].all()
    assert target[-1, -depth * top_k :].all()


def test_matching_is_optimal_and_repeats_itself_on_ties():
    generator = torch.Generator().manual_seed(0)
    cost = torch.randint(0, 4, (9, 9), generator=generator).float()  # many ties
    columns = match_columns(cost)
    assert sorted(columns.tolist()) == list(range(9))
    rows, best = linear_sum_assignment(cost.numpy())
    assert cost[torch.arange(9), columns].sum() == cost.numpy()[rows, best].sum()
    assert all(torch.equal(columns, match_columns(cost.clone())) for _ in range(5))


def test_the_costs_are_waited_for_on_their_own_device(monkeypatch):
    """Which is not the current one where `system.device` is cuda:1. On pretended tensors: there is no GPU here."""
    queued: list[torch.device] = []
    event = SimpleNamespace()

    def stream(device=None):
        queued.append(device)
        return SimpleNamespace(record_event=lambda: event)

    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    with FakeTensorMode():
        matching = Matching(torch.ones(3, 3, device="cuda:1"))
    assert queued == [torch.device("cuda:1")] and matching.arrived is event


def test_match_cost_is_the_l1_distance_between_columns():
    generator = torch.Generator().manual_seed(0)
    chosen, target = (torch.randint(0, 2, (50, 6), generator=generator).float() for _ in range(2))
    assert torch.equal(match_cost(chosen, target), (chosen[:, :, None] - target[:, None, :]).abs().sum(dim=0))


def test_mask_is_one_and_the_sum_over_the_chosen_experts():
    method = tiny("switch_dit").requires_grad_(False)
    block = method.network.blocks[0]
    x, t, y = batch(method.intervals[0])
    tokens, time, _ = method.network.embed(x, t, y)
    probabilities, gates = block.gate(time)
    for sample in range(len(t)):
        expected = torch.zeros_like(tokens[sample])
        for expert in probabilities[sample].topk(2).indices:
            linear = tokens[sample] @ block.expert_weight[expert] + block.expert_bias[expert]
            expected = expected + probabilities[sample, expert] * linear
        assert_close(block.deviation(tokens, gates)[sample], expected)


@pytest.mark.parametrize("plain", [(), ("masks",)], ids=str)
def test_a_mask_that_has_just_begun_to_learn_is_seen_in_bfloat16(plain: tuple[str, ...]) -> None:
    """Experts start at zero, and bfloat16 rounds 1.003 to 1: what enters the backbone's block, beside float32."""
    method = tiny("switch_dit").requires_grad_(False)
    block = method.network.blocks[0]
    x, t, y = batch(method.intervals[0])
    tokens, time, condition = method.network.embed(x, t, y)
    block.expert_weight *= 1e-3
    block.expert_bias *= 1e-3
    entering: list[torch.Tensor] = []
    block.block.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0] - tokens))
    block(tokens, condition, time)
    with switches.without(*plain), torch.autocast("cpu", torch.bfloat16):
        block(tokens, condition, time)
    changed, in_bfloat16 = entering
    assert changed.abs().max() > 0 and (in_bfloat16 - changed).norm() < 0.02 * changed.norm()


class Casts(TorchDispatchMode):
    """What has been cast while this is on: dtypes and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten._to_copy.default:
            self.seen.append((output.dtype, tuple(output.shape)))
        return output


def test_mixed_weights_stay_in_bfloat16_there_and_back() -> None:
    """One matrix per sample: 38 MB in float32 at a width of 384 and 64 samples. Tokens and their gradient are cast once."""
    method = tiny("switch_dit")
    block = method.network.blocks[0]
    x, t, y = batch(method.intervals[0])
    tokens, time, _ = (each.detach().requires_grad_() for each in method.network.embed(x, t, y))
    with Casts() as casts:
        with torch.autocast("cpu", torch.bfloat16):
            deviation = block.deviation(tokens, block.gate(time)[1])
        deviation.sum().backward()
    assert deviation.dtype == torch.bfloat16
    assert (len(t), TINY.width, TINY.width) not in [shape for _, shape in casts.seen]
    of_tokens = [dtype for dtype, shape in casts.seen if shape == tokens.shape]
    assert of_tokens == [torch.bfloat16, torch.float32]


def test_gate_sees_the_timestep_and_not_the_label():
    method = tiny("switch_dit").requires_grad_(False)
    x, t, y = batch(method.intervals[0])
    first, second = (method.denoise_and_route(x, t, labels)[1] for labels in (y, (y + 1) % 4))
    assert torch.equal(first, second)


def test_initial_network_is_dense():
    torch.manual_seed(0)
    dense, method = Dense(TINY, num_timesteps=NUM_TIMESTEPS), SwitchDiT(TINY, num_timesteps=NUM_TIMESTEPS)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(std=0.2)
    method.load_dense(dense.network.state_dict())
    x, t, y = batch(method.intervals[0])
    assert torch.equal(method(x, t, y, method.intervals[0]).output, dense.network(x, t, y))
    untouched = SwitchDiT(TINY)
    assert all(block.expert_weight.count_nonzero() == 0 for block in untouched.network.blocks)


def test_prior_sends_no_gradient_to_the_blocks():
    method = tiny("switch_dit")
    x, t, y = batch(method.intervals[0])
    method(x, t, y, method.intervals[0]).penalties["diffusion_prior"].backward()
    touched = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    assert all(".gate." in name or "time_embedding" in name for name in touched)


def test_zero_prior_weight_adds_no_penalty():
    method = tiny("switch_dit", prior_weight=0.0)
    x, t, y = batch(method.intervals[0])
    assert method(x, t, y, method.intervals[0]).penalties == {}


def test_active_parameters_leave_out_the_idle_experts():
    method = tiny("switch_dit")
    idle = TINY.depth * (TINY.width * TINY.width + TINY.width)
    assert method.num_active_parameters() == sum(p.numel() for p in method.parameters()) - idle


def test_impossible_top_k_is_refused():
    with pytest.raises(ValueError, match="top_k is 4"):
        SwitchDiT(TINY, experts=3, top_k=4)


@pytest.mark.parametrize(("size", "millions"), [("S/2", 36), ("B/2", 144), ("XL/2", 749)])
def test_published_sizes_count_the_active_experts(size, millions):
    with torch.device("meta"):
        method = SwitchDiT(Shape.of_size(size))
    assert method.num_active_parameters() / 1e6 == pytest.approx(millions, rel=0.015)
    assert sum(p.numel() for p in method.parameters()) > 1.02 * method.num_active_parameters()


def test_the_assignment_is_counted_in_float32_under_autocast():
    torch.manual_seed(0)
    method = SwitchDiT(TINY, num_timesteps=1000)
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain = method.matched_target()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.matched_target(), plain)


def test_with_continuous_time_the_prior_looks_at_the_gates_that_the_network_uses():
    torch.manual_seed(0)
    method = SwitchDiT(TINY, num_timesteps=100)
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    middles = (torch.arange(100) + 0.5) / 100
    x, y = torch.randn(100, 2, 4, 4), torch.zeros(100, dtype=torch.int64)
    _, used = method.denoise_and_route(x, middles, y)
    torch.testing.assert_close(method.all_probabilities(continuous=True), used, atol=1e-6, rtol=0)
    assert not torch.allclose(method.all_probabilities(), used, atol=1e-2)
