"""Do released checkpoints load, and go back, whatever their sizes; and is everything else refused in one sentence?"""

import argparse
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import LAYOUT_OF_GOLDEN, NUM_TIMESTEPS, TINY, assert_close, batch, golden_method, golden_state, tiny
from safetensors.torch import save_file

from methods import METHODS
from methods.backbone import Shape
from methods.released import exact_ratio, load_released, read_weights, to_released

ODD = Shape(
    depth=1, width=20, num_heads=5, patch_size=4, input_size=12, channels=3, num_classes=7, learn_sigma=False, mlp_ratio=2.35
)
OTHERS = [  # layout, our method, its options, the part of them that the tensors cannot tell
    ("dit", "dense", {}, {}),
    ("dtr", "dtr", {}, {"alpha": 2.0, "beta": 0.55}),
    ("dtr", "dtr", {}, {"routing": "random"}),
    ("switch_dit", "switch_dit", {"experts": 5}, {"top_k": 3}),
    ("dit_moe", "dit_moe", {"experts": 6, "shared_width": 1.15}, {"top_k": 3}),
    ("dit_moe", "dit_moe", {"experts": 11, "shared_width": 0}, {"top_k": 1}),
    ("remix_dit", "remix_dit", {"experts": 7, "bases": 3}, {"mixer": "softmax"}),
    ("remix_dit", "remix_dit", {"experts": 3, "bases": 5}, {"mixer": "raw"}),
    ("remix_dit", "remix_dit", {"experts": 4, "bases": 1}, {"mixer": "one_hot"}),
]


@pytest.mark.parametrize("name", LAYOUT_OF_GOLDEN)
def test_golden_checkpoints_go_round(name):
    state = golden_state(name)
    back = to_released(golden_method(name))
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype, key
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize(("layout", "name", "inferred", "given"), OTHERS)
def test_other_sizes_are_inferred_and_go_round(layout, name, inferred, given):
    torch.manual_seed(0)
    method = METHODS[name](ODD, num_timesteps=NUM_TIMESTEPS, **inferred, **given)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_(std=0.2)
    state = to_released(method)
    loaded = load_released(layout, state, num_heads=5, num_timesteps=NUM_TIMESTEPS, **given)
    assert type(loaded) is METHODS[name]
    assert loaded.intervals == method.intervals
    assert loaded.network.shape.mlp_width == ODD.mlp_width
    assert loaded.network.shape.learn_sigma is False
    own = method.state_dict()
    assert loaded.state_dict().keys() == own.keys()
    assert all(torch.equal(tensor, own[key]) for key, tensor in loaded.state_dict().items())
    interval = method.intervals[-1]
    x, t, y = batch(interval, 3, ODD)
    assert torch.equal(loaded(x, t, y, interval).output, method(x, t, y, interval).output)
    again = to_released(loaded)
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_checkpoint_may_lie_under_ema_or_model():
    state = golden_state("dit")
    damped = {name: tensor / 2 for name, tensor in state.items()}
    bias = "final_layer.linear.bias"
    for content, expected in [
        ({"model": state, "opt": {}, "args": argparse.Namespace()}, state),
        ({"ema": damped}, damped),
        ({"model": state, "ema": damped}, damped),
    ]:
        assert torch.equal(load_released("dit", content, num_heads=4).network.final.linear.bias, expected[bias])


def test_constant_tables_may_be_absent():
    for name, constants in [("dtr", "_unit_mapping"), ("switch_dit", "_unit_mapping"), ("switch_dit", "full_time")]:
        state = {key: tensor for key, tensor in golden_state(name).items() if constants not in key}
        method = load_released(LAYOUT_OF_GOLDEN[name], state, num_heads=4)
        assert to_released(method).keys() == golden_state(name).keys()


def test_absent_positions_need_an_input_size():
    state = golden_state("dit")
    positions = state.pop("pos_embed")
    method = load_released("dit", state, num_heads=4, input_size=8)
    assert_close(method.network.positions, positions, 1e-6)
    with pytest.raises(ValueError, match="give input_size"):
        load_released("dit", state, num_heads=4)
    with pytest.raises(ValueError, match="pos_embed is for 8"):
        load_released("dit", state | {"pos_embed": positions}, num_heads=4, input_size=16)


@pytest.mark.parametrize("options", [{"alpha": 3.0}, {"beta": 0.75}])
def test_mask_table_that_contradicts_the_options_is_refused(options):
    with pytest.raises(ValueError, match=r"blocks.0.routing._unit_mapping is not the one of alpha=.*, beta="):
        golden_method("dtr", **options)


def test_tables_of_another_top_k_or_schedule_are_refused():
    with pytest.raises(ValueError, match=r"prior\._unit_mapping is not the one of top_k=1"):
        golden_method("switch_dit", top_k=1)
    with pytest.raises(ValueError, match=r"full_time .* where \(timesteps\) = \(500\)"):
        golden_method("switch_dit", num_timesteps=500)


def test_random_masks_of_the_checkpoint_are_used_per_block():
    state = golden_state("dtr")
    names = [f"blocks.{i}.routing._unit_mapping" for i in range(3)]
    generator = torch.Generator().manual_seed(0)
    for name in names:
        state[name] = (torch.rand(1000, 48, generator=generator) < 0.8).float()
    method = load_released("dtr", state, num_heads=4, routing="random")
    assert all(torch.equal(method.masks[i].float(), state[name]) for i, name in enumerate(names))
    assert all(torch.equal(to_released(method)[name], state[name]) for name in names)
    with pytest.raises(ValueError, match="is not the one of alpha"):
        load_released("dtr", state, num_heads=4)
    partly = {key: tensor for key, tensor in state.items() if key != names[1]}
    with pytest.raises(ValueError, match=f"lacks the random masks {names[1]}:"):
        load_released("dtr", partly, num_heads=4, routing="random")
    with pytest.raises(ValueError, match="zeros and ones only"):
        load_released("dtr", state | {names[0]: state[names[0]] * 0.5}, num_heads=4, routing="random")


@pytest.mark.parametrize("name", LAYOUT_OF_GOLDEN)
def test_all_that_does_not_fit_is_listed_at_once(name):
    state = golden_state(name)
    del state["t_embedder.mlp.2.bias"]
    del state["blocks.1.adaLN_modulation.1.weight"]
    state["blocks.0.attn.qkv.bias"] = torch.zeros(7)
    state["final_layer.linear.weight"] = torch.zeros(31, 48)
    state["blocks.9.oddity"] = torch.zeros(1)
    state["text_encoder.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="does not have the layout") as error:
        load_released(LAYOUT_OF_GOLDEN[name], state, num_heads=4)
    message = str(error.value)
    unknown, missing, misshaped = (part.partition(": ")[2] for part in message.split(" (", 1)[1].split("; "))
    assert unknown == "blocks.9.oddity, text_encoder.weight"
    assert missing == "t_embedder.mlp.2.bias, blocks.1.adaLN_modulation.1.weight"
    assert "blocks.0.attn.qkv.bias (7,) where" in misshaped
    assert "final_layer.linear.weight (31, 48) where" in misshaped
    assert "\n" not in message


@pytest.mark.parametrize("name", LAYOUT_OF_GOLDEN)
def test_each_missing_or_misshaped_tensor_is_named(name):
    state = golden_state(name)
    for key, tensor in state.items():
        if key.endswith(("_unit_mapping", "full_time")):
            continue
        if key != "pos_embed":
            with pytest.raises(ValueError, match=f"missing: {key}"):
                load_released(LAYOUT_OF_GOLDEN[name], {k: v for k, v in state.items() if k != key}, num_heads=4)
        with pytest.raises(ValueError, match=f"misshaped: {key}"):
            load_released(LAYOUT_OF_GOLDEN[name], state | {key: tensor.unsqueeze(-1).expand(*tensor.shape, 2)}, num_heads=4)
        with pytest.raises(ValueError, match=rf"{key} .* of torch.int64 where .* floating-point"):
            load_released(LAYOUT_OF_GOLDEN[name], state | {key: tensor.long()}, num_heads=4)


def test_empty_and_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match="missing: x_embedder"):
        load_released("dit", {}, num_heads=4)
    ends = {key: tensor for key, tensor in golden_state("dit").items() if not key.startswith("blocks.")}
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.attn"):
        load_released("dit", ends, num_heads=4)
    for name in LAYOUT_OF_GOLDEN:
        for layout in set(LAYOUT_OF_GOLDEN.values()) - {LAYOUT_OF_GOLDEN[name]}:
            if (name, layout) != ("dit", "dtr"):  # DTR adds no parameters: a dense checkpoint is one of DTR
                with pytest.raises(ValueError, match=f"does not have the layout '{layout}'"):
                    load_released(layout, golden_state(name), num_heads=4)


def test_partly_shared_experts_are_incomplete():
    state = golden_state("dit_moe_tp1")
    shared = [key for key in state if "shared" in key]
    for key in shared[1:]:
        del state[key]
    with pytest.raises(ValueError, match=f"missing: {shared[1]}") as error:
        load_released("dit_moe", state, num_heads=4)
    assert all(key in str(error.value) for key in shared[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"layout": "unet"}, "the layout 'unet' is not known: choose one of dit, dtr, "),
        ({"top_k": 2}, "the layout 'dit' has no option top_k"),
        ({"num_heads": 5}, "cannot be divided into 5 heads"),
        ({"state_dict": {"step": 3}}, r"entries that are not tensors \(step\)"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    arguments = {"layout": "dit", "state_dict": golden_state("dit"), "num_heads": 4} | call
    layout, state = arguments.pop("layout"), arguments.pop("state_dict")
    with pytest.raises(ValueError, match=message):
        load_released(layout, state, **arguments)


@pytest.mark.parametrize("variant", ["multi_expert", "dit_moe gelu", "remix_dit local"])
def test_what_no_released_code_has_is_not_written(variant):
    with pytest.raises(ValueError, match="has no released layout"):
        to_released(tiny(variant))


def test_written_tensors_are_copies():
    method = tiny("dense")
    to_released(method)["final_layer.linear.bias"].fill_(9)
    assert not (method.network.final.linear.bias == 9).any()


def test_hidden_widths_survive_floating_point():
    for width in range(4, 400, 4):
        assert all(int(width * exact_ratio(hidden, width)) == hidden for hidden in range(1, 4 * width, 7))


def test_files_of_both_kinds_are_read(tmp_path):
    state = golden_state("dit")
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"ema": state, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "weights.pt")
    plain, nested = read_weights(tmp_path / "weights.safetensors"), read_weights(str(tmp_path / "weights.pt"))
    assert all(torch.equal(plain[key], tensor) for key, tensor in state.items())
    assert all(torch.equal(nested["ema"][key], tensor) for key, tensor in state.items())


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_executed(tmp_path):
    sprung = tmp_path / "sprung"
    torch.save({"model": Trap(sprung)}, tmp_path / "trap.pt")
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match="which is never done"):
        read_weights(tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(tmp_path / "trap.pkl")
    assert not sprung.exists()
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert sprung.exists()  # the trap is a real one


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    torch.save({"a": torch.randn(100)}, tmp_path / "whole.pt")
    save_file({"a": torch.randn(100)}, tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(tmp_path)
    for name in ("whole.pt", "whole.safetensors"):
        data = (tmp_path / name).read_bytes()
        for length in range(0, len(data), 37):
            (tmp_path / "cut").write_bytes(data[:length])
            with pytest.raises(ValueError, match=r"damaged|holds no weights"):
                read_weights(tmp_path / "cut")
    data = bytearray((tmp_path / "whole.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
    data[info.header_offset + 150] ^= 1  # one bit inside the tensor: only the checksum knows
    (tmp_path / "flipped.pt").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_weights(tmp_path / "flipped.pt")
    (tmp_path / "notes.txt").write_text("these are not the weights you are looking for")
    with pytest.raises(ValueError, match="holds no weights"):
        read_weights(tmp_path / "notes.txt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor"):
        read_weights(tmp_path / "tensor.pt")


def test_a_mixture_of_one_expert_round_trips():
    torch.manual_seed(0)
    method = METHODS["dit_moe"](TINY, experts=1, top_k=1)
    again = load_released("dit_moe", to_released(method), num_heads=TINY.num_heads, top_k=1)
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
