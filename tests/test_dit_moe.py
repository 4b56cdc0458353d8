"""Does DiT-MoE route, mix and balance as its released code does?"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NUM_TIMESTEPS, TINY, assert_close, assert_gradients, batch, block_outputs, golden, golden_method, tiny

from bench.diffusion import guide
from bench.method import Probe
from methods.backbone import Shape
from methods.dit_moe import DiTMoE, MixtureMLP, SwiGLU, balance_loss

NAME = "dit_moe_tp1"


def test_outputs_and_guided_outputs_are_those_of_the_released_code():
    tensors, _ = golden(NAME)
    method = golden_method(NAME).requires_grad_(False)
    denoiser = method.specialise(method.intervals[0])
    assert_close(denoiser(tensors["x"], tensors["t"], tensors["y"]), tensors["out_eval"])
    assert_close(guide(denoiser, tensors["cfg_x"], tensors["cfg_t"], tensors["cfg_y"], 1.5, 3), tensors["out_cfg"])


def test_blocks_are_those_of_the_released_code():
    tensors, _ = golden(NAME)
    method = golden_method(NAME).requires_grad_(False)
    outputs = block_outputs(method, lambda: method.denoise_and_route(tensors["x"], tensors["t"], tensors["y"]))
    for index, output in enumerate(outputs):
        assert_close(output, tensors[f"hid.block{index}"])


@pytest.mark.parametrize("index", [0, 1])
def test_mixtures_are_those_of_the_released_code(index):
    tensors, _ = golden(NAME)
    mixture = golden_method(NAME).requires_grad_(False).network.blocks[index].mlp
    tokens = tensors[f"moe_in.block{index}"]
    output, mean_probability, share = mixture(tokens)
    assert_close(output, tensors[f"moe_out.block{index}"])
    _, chosen, gates = mixture.router(tokens.flatten(0, 1))
    expected = tensors[f"gate.block{index}.topk_idx"]
    assert torch.equal(chosen.sort(dim=1).values, expected.sort(dim=1).values)  # sets have no order
    order, expected_order = chosen.argsort(dim=1), expected.argsort(dim=1)
    weights = tensors[f"gate.block{index}.topk_weight"]
    assert_close(gates.gather(1, order), weights.gather(1, expected_order))
    assert_close(0.01 * balance_loss(mean_probability[None], share[None]), tensors[f"aux.block{index}"], 1e-6)


def test_training_pass_is_that_of_the_released_code():
    tensors, _ = golden(NAME)
    method = golden_method(NAME)
    prediction = method(tensors["x"], tensors["t"], tensors["y"], method.intervals[0])
    assert_close(prediction.output, tensors["out_train"])
    assert_close(prediction.penalties["balance"], tensors["aux.sum"], 1e-6)
    loss = prediction.output.square().mean()
    assert_close(loss, tensors["loss_total"])
    (loss + prediction.penalties["balance"]).backward()
    assert_gradients(method, NAME)


def naive_mixture(mixture: MixtureMLP, tokens: torch.Tensor) -> torch.Tensor:
    """Token by token and expert by expert, as one would write it down."""
    rows = tokens.flatten(0, 1)
    _, chosen, gates = mixture.router(rows)
    output = torch.zeros_like(rows)
    for n, row in enumerate(rows):
        for expert, gate in zip(chosen[n], gates[n], strict=True):
            if mixture.gated:
                first, second = mixture.weight_in[expert].chunk(2)
                hidden = F.silu(first @ row) * (second @ row)
                output[n] += gate * (mixture.weight_out[expert] @ hidden)
            else:
                hidden = F.gelu(mixture.weight_in[expert] @ row + mixture.bias_in[expert], approximate="tanh")
                output[n] += gate * (mixture.weight_out[expert] @ hidden + mixture.bias_out[expert])
    if mixture.shared is not None:
        output = output + mixture.shared(rows)
    return output.view(tokens.shape)


@pytest.mark.parametrize("variant", ["dit_moe", "dit_moe no shared", "dit_moe gelu"])
def test_mixture_equals_the_naive_loop(variant):
    mixture = tiny(variant).requires_grad_(False).network.blocks[0].mlp
    tokens = torch.randn(3, 4, TINY.width, generator=torch.Generator().manual_seed(0))
    assert_close(mixture(tokens)[0], naive_mixture(mixture, tokens))


def test_kept_gates_are_renormalised_only_when_asked():
    plain, renormalised = tiny("dit_moe no shared", top_k=2), tiny("dit_moe no shared", top_k=2, renormalise=True)
    rows = torch.randn(5, TINY.width)
    assert (plain.network.blocks[0].mlp.router(rows)[2].sum(dim=1) < 1).all()
    assert_close(renormalised.network.blocks[0].mlp.router(rows)[2].sum(dim=1), torch.ones(5))


def test_identical_gated_experts_are_one_expert():
    method = tiny("dit_moe", shared_width=0.0, renormalise=True).requires_grad_(False)
    one = SwiGLU(TINY.width, TINY.mlp_width)
    x, t, y = batch(method.intervals[0])
    tokens, _, condition = method.network.embed(x, t, y)
    for block in method.network.blocks:
        for stacked in (block.mlp.weight_in, block.mlp.weight_out):
            stacked.copy_(stacked[:1].expand_as(stacked))
        one.gate_up.weight.data, one.down.weight.data = block.mlp.weight_in[0], block.mlp.weight_out[0]
        tokens = block.apply_branches(tokens, condition, block.attn, one)  # a dense block with the expert as its MLP
    assert_close(method(x, t, y, method.intervals[0]).output, method.network.decode(tokens, condition))


def test_start_from_dense_is_exact_for_experts_of_the_dense_form():
    dense = tiny("dense").requires_grad_(False)
    torch.manual_seed(3)
    method = DiTMoE(TINY, num_timesteps=NUM_TIMESTEPS, experts=4, expert="gelu_mlp", shared_width=0, renormalise=True)
    method.load_dense(dense.network.state_dict())
    x, t, y = batch(method.intervals[0])
    assert_close(method(x, t, y, method.intervals[0]).output, dense.network(x, t, y), 1e-6)
    routers = torch.cat([block.mlp.router.weight.flatten() for block in method.network.blocks])
    assert 0.015 < routers.std() < 0.025


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expert": "gelu_mlp", "shared_width": 0},
        {"expert": "gelu_mlp", "renormalise": True},
        {"shared_width": 0, "renormalise": True},
    ],
)
def test_start_from_dense_is_refused_where_it_would_not_be_exact(options):
    method = DiTMoE(TINY, num_timesteps=NUM_TIMESTEPS, **options)
    with pytest.raises(ValueError, match="set expert: gelu_mlp, shared_width: 0 and renormalise: true"):
        method.load_dense(tiny("dense").network.state_dict())


def test_balance_loss_is_least_when_balanced():
    even = torch.full((2, 4), 0.25)
    assert balance_loss(even, even) == 2  # one per block
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2)
    assert balance_loss(skewed, skewed) > 2


def probe_of(y: torch.Tensor) -> Probe:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(y), TINY.channels, TINY.input_size, TINY.input_size, generator=generator)
    return Probe(x, torch.arange(len(y)) % NUM_TIMESTEPS, y)


def test_routing_by_position_and_class_is_that_of_each_token_in_as_many_passes_as_there_are_groups(monkeypatch):
    method = tiny("dit_moe").requires_grad_(False)
    probe = probe_of(torch.tensor([0, 2, 0, TINY.num_classes] * 15))
    passes = []
    plain = method.denoise_and_route
    monkeypatch.setattr(method, "denoise_and_route", lambda *inputs: passes.append(1) or plain(*inputs))
    found = method.diagnostics(probe)
    assert len(passes) == 20
    monkeypatch.undo()
    counts = torch.zeros(TINY.depth, TINY.num_classes + 1, TINY.num_tokens, 4)  # image by image and token by token
    for i, label in enumerate(probe.y.tolist()):
        blocks = iter(range(TINY.depth))

        def count(router, inputs, output, label=label, blocks=blocks):
            block = next(blocks)
            for position, experts in enumerate(output[1].tolist()):
                for expert in experts:
                    counts[block, label, position, expert] += 1

        hooks = [block.mlp.router.register_forward_hook(count) for block in method.network.blocks]
        method.denoise_and_route(probe.x[i : i + 1], probe.t[i : i + 1], probe.y[i : i + 1])
        for hook in hooks:
            hook.remove()
    assert counts.sum() == 60 * TINY.depth * TINY.num_tokens * 2
    axes, by_position = found["routing_by_position"]
    assert axes == ("block", "position", "expert")
    expected = counts.sum(dim=1)
    assert_close(torch.from_numpy(by_position), expected / expected.sum(dim=-1, keepdim=True))
    assert by_position.std(axis=1).max() > 0.05  # positions do differ
    axes, by_class = found["routing_by_class"]
    assert axes == ("block", "class", "expert") and by_class.shape == (TINY.depth, TINY.num_classes, 4)
    expected = counts.sum(dim=2)[:, [0, 2]]
    assert_close(torch.from_numpy(by_class[:, [0, 2]]), expected / expected.sum(dim=-1, keepdim=True))
    assert np.isnan(by_class[:, 1]).all()  # no image; and those without a label are of no class
    assert not any(block.mlp.router._forward_hooks for block in method.network.blocks)


def test_positions_are_in_raster_order():
    """A probe whose images differ in one patch: in the first block only that token goes elsewhere."""
    method = tiny("dit_moe").requires_grad_(False)
    grid = TINY.input_size // TINY.patch_size
    row, column = grid - 1, 0
    probe = probe_of(torch.zeros(1, dtype=torch.int64))
    method.network.blocks[0].attn.proj.weight.zero_()  # tokens do not see each other
    method.network.blocks[0].attn.proj.bias.zero_()
    before = method.diagnostics(probe)["routing_by_position"][1][0]
    changed = set()
    for seed in range(20):
        x = probe.x.clone()
        noise = torch.randn(TINY.channels, 2, 2, generator=torch.Generator().manual_seed(seed)) * 10
        x[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = noise
        after = method.diagnostics(probe._replace(x=x))["routing_by_position"][1][0]
        changed |= set(np.flatnonzero((before != after).any(axis=1)).tolist())
    assert changed == {row * grid + column}


@pytest.mark.parametrize(
    ("size", "experts", "stored", "active"), [("S/2", 8, 199, 71), ("XL/2", 8, 4100, 1500), ("G/2", 16, 16500, 3100)]
)
def test_published_sizes_have_their_parameters(size, experts, stored, active):
    """Table 2 of arXiv 2407.11633, in millions, which it rounds in both directions."""
    with torch.device("meta"):
        method = DiTMoE(Shape.of_size(size), experts=experts)
    assert sum(p.numel() for p in method.parameters()) / 1e6 == pytest.approx(stored, rel=0.03)
    assert method.num_active_parameters() / 1e6 == pytest.approx(active, rel=0.03)


def test_initial_router_is_kaiming_and_every_expert_is_drawn_as_a_linear_of_its_own():
    torch.manual_seed(0)
    shape = Shape(depth=1, width=64, num_heads=4)
    mixture = DiTMoE(shape, experts=16).network.blocks[0].mlp
    bound = 64**-0.5  # Kaiming-uniform with a = sqrt(5)
    assert 0.95 * bound < mixture.router.weight.abs().max() <= bound
    bound = (6 / (64 + shape.mlp_width)) ** 0.5  # Xavier-uniform of one gate, up or down matrix
    for matrix in [*mixture.weight_in.unflatten(1, (2, -1)).flatten(0, 1), *mixture.weight_out]:
        assert 0.95 * bound < matrix.abs().max() <= bound
    assert not torch.equal(mixture.weight_out[0], mixture.weight_out[1])
