"""Do sorted rows run through stacked experts the same way on every path: grouped, in pieces, in a loop?"""

import pytest
import torch
from helpers import TINY, assert_close, batch, tiny

import methods.grouped
from bench.switches import without
from methods.grouped import (
    GROUPED_DTYPES,
    PIECE_BYTES,
    combine_rows,
    expert_mlp,
    gpu_can_group,
    grouped_linear,
    rows_in_a_piece,
    runs_in_pieces,
    sort_by_expert,
    take_rows,
)


def losses_and_gradients(variant: str) -> list[torch.Tensor]:
    method = tiny(variant)
    x, t, y = batch(method.intervals[0])
    prediction = method(x, t, y, method.intervals[0])
    (prediction.output.square().mean() + prediction.penalties["balance"]).backward()
    return [prediction.output.detach()] + [p.grad for p in method.parameters() if p.grad is not None]


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """One entry for each call of that function of `methods.grouped`, which goes on as it is."""
    calls: list[int] = []
    plain = getattr(methods.grouped, name)
    monkeypatch.setattr(methods.grouped, name, lambda *args, **named: calls.append(1) or plain(*args, **named))
    return calls


@pytest.mark.parametrize("variant", ["dit_moe", "dit_moe gelu"])
def test_grouped_products_equal_the_loop_over_experts(variant, monkeypatch):
    calls = count_calls(monkeypatch, "looped_mm")
    with without("pieces"):
        grouped = losses_and_gradients(variant)
        assert not calls or torch.float32 not in GROUPED_DTYPES
        monkeypatch.setattr(methods.grouped, "can_group", lambda rows, weight: False)
        looped = losses_and_gradients(variant)
    assert calls
    for one, other in zip(grouped, looped, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("variant", ["dit_moe", "dit_moe no shared", "dit_moe gelu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_equal_grouped_products(variant, precision, monkeypatch):
    """Whole experts, and pieces of three rows of an expert at most."""
    calls = count_calls(monkeypatch, "one_expert")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        with without("pieces"):
            grouped = losses_and_gradients(variant)
        assert not calls
        whole = losses_and_gradients(variant)
        num_whole = len(calls)
        assert 0 < num_whole <= TINY.depth * 4
        monkeypatch.setattr(methods.grouped, "rows_in_a_piece", lambda rows, weight: 3)
        pieces = losses_and_gradients(variant)
        assert len(calls) > 2 * num_whole
    for one, *others in zip(grouped, whole, pieces, strict=True):
        for other in others:
            assert other.dtype == one.dtype
            error = (other.float() - one.float()).norm() / one.float().norm().clamp(min=1e-9)
            assert error <= (1e-6 if precision == "fp32" else 0.02)


@pytest.mark.parametrize("variant", ["dit_moe", "dit_moe gelu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("most", [3, 1000])
def test_without_gradients_the_same_comes_out(variant, precision, most, monkeypatch):
    """Where rows are taken piece after piece, and memory is written over. On some CPUs products of few rows round otherwise."""
    monkeypatch.setattr(methods.grouped, "rows_in_a_piece", lambda rows, weight: most)
    mixture = tiny(variant).network.blocks[0].mlp
    tokens = torch.randn(3, 4, TINY.width, generator=torch.Generator().manual_seed(0))
    kept = tokens.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        expected = mixture(tokens)
        with torch.no_grad():
            found = mixture(tokens)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other.detach(), 1e-6 if precision == "fp32" else 1e-2)
    assert torch.equal(tokens, kept)


def test_a_piece_is_below_what_is_given_back_to_the_system():
    weight = torch.empty(3072, 384, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        hidden_bytes = rows_in_a_piece(torch.empty(1, 384, dtype=dtype), weight) * 3072 * dtype.itemsize
        assert PIECE_BYTES / 2 < hidden_bytes <= PIECE_BYTES < 32 << 20
    assert rows_in_a_piece(torch.empty(1, 1), torch.empty(PIECE_BYTES, 1, device="meta")) == 1


def test_pieces_are_for_plain_code_on_a_cpu(monkeypatch):
    rows = torch.empty(1, 1)
    assert runs_in_pieces(rows) and not runs_in_pieces(rows.to("meta"))
    for name in ("pieces", "grouped"):
        with without(name):
            assert not runs_in_pieces(rows)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not runs_in_pieces(rows)


@pytest.mark.parametrize("plainly", [(), ("pieces",)])
def test_experts_without_tokens_have_gradients_of_zero(plainly):
    chosen = torch.tensor([[1, 4], [4, 1], [1, 4]])
    stacks = [torch.randn(6, *shape, requires_grad=True) for shape in ((8, 4), (4, 8), (8,), (4,))]
    order, inverse, ends = sort_by_expert(chosen, 6)
    with without(*plainly):
        expert_mlp(torch.randn(3, 4), order, inverse, ends, *stacks).square().sum().backward()
    for stack in stacks:
        assert stack.grad[[0, 2, 3, 5]].count_nonzero() == 0
        assert all(stack.grad[expert].count_nonzero() for expert in (1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_without_tokens_cost_and_break_nothing(dtype):
    chosen = torch.tensor([[1, 4], [4, 1], [1, 4]])  # experts 0, 2, 3 and 5 get nothing
    weight = torch.randn(6, 8, 4, dtype=dtype, requires_grad=True)
    bias = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    rows = torch.randn(3, 4, dtype=dtype)
    order, inverse, ends = sort_by_expert(chosen, 6)
    assert ends.tolist() == [0, 3, 3, 3, 6, 6]
    output = combine_rows(
        grouped_linear(take_rows(rows, order, inverse, 2), weight, bias, ends), torch.ones(3, 2, dtype=dtype), order, inverse
    )
    expected = torch.stack([sum(weight[e] @ row + bias[e] for e in of_row) for row, of_row in zip(rows, chosen, strict=True)])
    assert_close(output, expected)
    output.sum().backward()
    for gradient in (weight.grad, bias.grad):
        assert gradient[[0, 2, 3, 5]].count_nonzero() == 0
        assert gradient[[1, 4]].isfinite().all()
        assert gradient[[1, 4]].count_nonzero()


@pytest.mark.parametrize("plainly", [(), ("pieces",)])
def test_taking_and_combining_rows_have_the_right_gradients(plainly):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 5, (7, 2), generator=generator)
    order, inverse, _ = sort_by_expert(chosen, 5)
    rows = torch.randn(7, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    many = torch.randn(14, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    gates = torch.rand(7, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    with without(*plainly):
        assert torch.autograd.gradcheck(lambda r: take_rows(r, order, inverse, 2), (rows,))
        assert torch.autograd.gradcheck(lambda m, g: combine_rows(m, g, order, inverse), (many, gates))
        expected = (many[inverse].view(7, 2, 3) * gates.unsqueeze(-1)).sum(dim=1)
        assert_close(combine_rows(many, gates, order, inverse), expected)


@pytest.mark.parametrize("plainly", [(), ("pieces",)])
def test_whole_mixture_has_the_right_gradients(plainly):
    mixture = tiny("dit_moe").double().network.blocks[0].mlp
    mixture.router.weight.requires_grad_(False)  # the router is in float32 on purpose: near-ties decide
    tokens = torch.randn(1, 3, TINY.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = tokens[0]
    _, chosen, gates = mixture.router(rows)
    order, inverse, ends = sort_by_expert(chosen, 4)

    def run(rows, weight_in, weight_out):
        mixed = expert_mlp(rows, order, inverse, ends, weight_in, weight_out, None, None)
        return combine_rows(mixed, gates, order, inverse)

    weight_in, weight_out = mixture.weight_in.detach().requires_grad_(), mixture.weight_out.detach().requires_grad_()
    with without(*plainly):
        assert torch.autograd.gradcheck(run, (rows.requires_grad_(), weight_in, weight_out), fast_mode=True)


@pytest.mark.parametrize(
    ("capability", "can"), [((7, 5), False), ((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]
)
def test_grouped_products_are_for_gpus_that_have_a_kernel(capability, can, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert gpu_can_group() == can


@pytest.mark.parametrize("operation", ["looped_mm", "looped_mm_weight_gradient", "match_columns"])
def test_what_comes_to_the_host_is_kept_out_of_cuda_graphs(operation):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.timestep_bench, operation).default.tags


def test_rows_are_sorted_by_expert_and_find_their_way_back():
    chosen = torch.tensor([[2, 0], [1, 2], [0, 1]])
    order, inverse, ends = sort_by_expert(chosen, 3)
    assert chosen.flatten()[order].tolist() == [0, 0, 1, 1, 2, 2]
    assert order[inverse].tolist() == list(range(6))
    assert ends.tolist() == [2, 4, 6]
    assert ends.dtype == torch.int32
