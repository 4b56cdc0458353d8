"""Does the backbone compute what the released DiT computes, and start as it starts?"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_gradients, block_outputs, golden, golden_method
from timm.layers import Mlp
from timm.models.vision_transformer import Attention

from bench.diffusion import guide
from methods import backbone
from methods.backbone import SIZES, Block, DiT, Shape, TimestepEmbedding, attention, modulate, sincos_positions, weigh

SMALL = Shape(depth=2, width=48, num_heads=4, patch_size=2, input_size=8, channels=4, num_classes=10)


def test_outputs_and_guided_outputs_are_those_of_the_released_code():
    tensors, _ = golden("dit")
    method = golden_method("dit").requires_grad_(False)
    denoiser = method.specialise(method.intervals[0])
    assert_close(denoiser(tensors["x"], tensors["t"], tensors["y"]), tensors["out_eval"])
    guided = guide(denoiser, tensors["cfg_x"], tensors["cfg_t"], tensors["cfg_y"], 1.5, 3)
    assert_close(guided, tensors["out_cfg"])
    all_channels = guide(denoiser, tensors["cfg_x"], tensors["cfg_t"], tensors["cfg_y"], 1.5, 4)
    assert (all_channels - tensors["out_cfg"]).abs().max() > 1e-3  # the golden values do tell the conventions apart


def test_inner_values_are_those_of_the_released_code():
    tensors, _ = golden("dit")
    network = golden_method("dit").requires_grad_(False).network
    x, t, y = (tensors[name] for name in "xty")
    tokens, time, condition = network.embed(x, t, y)
    assert_close(tokens - network.positions, tensors["hid.x_embedder"])
    assert_close(time, tensors["hid.t_embedder"])
    assert_close(condition - time, tensors["hid.y_embedder"])
    for index, block in enumerate(network.blocks):
        tokens = block(tokens, condition)
        assert_close(tokens, tensors[f"hid.block{index}"])
    assert_close(network.final(tokens, condition), tensors["hid.final_layer"])


def test_training_pass_is_that_of_the_released_code():
    tensors, _ = golden("dit")
    method = golden_method("dit")
    prediction = method(tensors["x"], tensors["t"], tensors["y"], method.intervals[0])
    assert_close(prediction.output, tensors["out_train"])
    loss = prediction.output.square().mean()
    assert_close(loss, tensors["loss_main"])
    assert prediction.penalties == {}
    loss.backward()
    assert_gradients(method, "dit")


def test_block_outputs_helper_sees_every_block():
    tensors, _ = golden("dit")
    method = golden_method("dit")
    outputs = block_outputs(method, lambda: method(tensors["x"], tensors["t"], tensors["y"], method.intervals[0]))
    assert len(outputs) == SMALL.depth + 1
    assert_close(outputs[-1], tensors["hid.block2"])


def test_block_equals_one_made_of_timm_modules():
    torch.manual_seed(0)
    block = Block(SMALL)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.1)
    attention = Attention(SMALL.width, num_heads=SMALL.num_heads, qkv_bias=True)
    attention.load_state_dict(block.attn.state_dict())
    mlp = Mlp(SMALL.width, 4 * SMALL.width, act_layer=lambda: torch.nn.GELU(approximate="tanh"))
    mlp.load_state_dict(block.mlp.state_dict())
    tokens, condition = torch.randn(3, 16, SMALL.width), torch.randn(3, SMALL.width)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
        part.unsqueeze(1) for part in block.modulation(F.silu(condition)).chunk(6, dim=1)
    )
    expected = tokens + gate_a * attention(modulate(F.layer_norm(tokens, (48,), eps=1e-6), shift_a, scale_a))
    expected = expected + gate_m * mlp(modulate(F.layer_norm(expected, (48,), eps=1e-6), shift_m, scale_m))
    assert_close(block(tokens, condition), expected, 1e-6)


@pytest.mark.parametrize("images_in_a_piece", [0, 2, 9])
def test_attention_trains_in_pieces_in_bf16_on_a_cpu(images_in_a_piece, monkeypatch):
    """The same bits as all at once; float32 has the fused kernel, and sampling where it is fast, that is with AMX."""
    torch.manual_seed(0)
    qkv = torch.randn(3, 5, 2, 7, 4, dtype=torch.bfloat16, requires_grad=True)
    fused = []
    monkeypatch.setattr(backbone, "PIECE_BYTES", images_in_a_piece * 2 * 7 * 7 * 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: fused.append(q.dtype) or weigh(q, k, v))
    upstream = torch.randn(5, 2, 7, 4).bfloat16()
    in_pieces, whole = attention(*qkv), weigh(*qkv)
    assert not fused and torch.equal(in_pieces, whole) and whole.std() > 0.1
    gradients = [torch.autograd.grad(output, qkv, upstream)[0] for output in (in_pieces, whole)]
    assert torch.equal(*gradients) and gradients[0].std() > 0.1
    for has_amx in (True, False):
        monkeypatch.setattr(backbone, "HAS_AMX", has_amx)
        with torch.no_grad():
            assert torch.equal(attention(*qkv), whole)
        assert fused == [torch.bfloat16]
    attention(*qkv.float())
    assert fused == [torch.bfloat16, torch.float32]


def test_initial_block_is_the_identity_and_the_initial_network_gives_zero():
    network = DiT(SMALL)
    tokens = torch.randn(2, 16, SMALL.width)
    assert torch.equal(network.blocks[0](tokens, torch.randn(2, SMALL.width)), tokens)
    assert network(torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 10])).count_nonzero() == 0


def test_initial_spread_of_the_weights():
    torch.manual_seed(0)
    network = DiT(Shape(depth=1, width=192, num_heads=3))
    patch = network.patch_embedding.proj.weight
    assert patch.abs().max() <= math.sqrt(6 / (192 + 4 * 2 * 2))  # Xavier on the (D, C*p*p) view
    assert patch.std().item() == pytest.approx(math.sqrt(2 / (192 + 16)), rel=0.05)
    assert network.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(math.sqrt(2 / (192 + 768)), rel=0.05)
    for weight in (network.time_embedding.fc1.weight, network.time_embedding.fc2.weight, network.label_embedding.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.blocks[0].attn.qkv.bias.count_nonzero() == 0


def test_positions_hold_the_column_first_and_sines_before_cosines():
    width, grid = 16, 3
    positions = sincos_positions(width, grid)[0]
    for row in range(grid):
        for column in range(grid):
            expected = []
            for place in (column, row):
                angles = [place * 10000 ** (-i / (width / 4)) for i in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert_close(positions[row * grid + column], torch.tensor(expected), 1e-6)


def test_timestep_embedding_takes_cosines_first():
    embedding = TimestepEmbedding(8)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.zero_()
        embedding.fc1.weight[0, 1] = 1  # the second frequency's cosine
        embedding.fc1.weight[1, 129] = 1  # and its sine
        embedding.fc2.weight.copy_(torch.eye(8))
    angle = 7 * math.exp(-math.log(10000) / 128)
    expected = F.silu(torch.tensor([math.cos(angle), math.sin(angle)]))
    assert_close(embedding(torch.tensor([7]))[0, :2], expected)


def test_unpatchify_puts_token_and_channel_where_they_belong():
    shape = Shape(depth=1, width=16, num_heads=2, patch_size=2, input_size=6, channels=3, learn_sigma=False)
    tokens = torch.arange(9 * 12.0).view(1, 9, 12)
    image = DiT(shape).unpatchify(tokens)[0]
    for row, column, channel in [(0, 0, 0), (1, 4, 2), (5, 2, 1), (4, 5, 0)]:
        token = (row // 2) * 3 + column // 2
        within = (row % 2) * 2 + column % 2
        assert image[channel, row, column] == tokens[0, token, within * 3 + channel]


def test_sizes_of_the_paper_have_its_parameters():
    millions = {"S/2": 33, "B/2": 130, "L/2": 458, "XL/2": 675}  # Table 1 of arXiv 2212.09748
    with torch.device("meta"):
        for size, expected in millions.items():
            network = DiT(Shape.of_size(size))
            assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(expected, rel=0.01), size
    assert Shape.of_size("G/4", input_size=64).patch_size == 4
    assert set(SIZES) == {"S", "B", "L", "XL", "G"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 50}, "50 cannot be divided into 6 heads"),
        ({"width": 42, "num_heads": 6}, "not a multiple of 4"),
        ({"input_size": 9}, "cannot be cut into patches of 2"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_impossible_shapes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Shape(**wrong)


@pytest.mark.parametrize("size", ["M/2", "S", "S/x", ""])
def test_unknown_sizes_are_refused(size):
    with pytest.raises(ValueError, match="is not known"):
        Shape.of_size(size)
