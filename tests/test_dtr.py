"""Does DTR route channels as its released code does?"""

import pytest
import torch
from helpers import NUM_TIMESTEPS, TINY, assert_close, assert_gradients, batch, block_outputs, golden, golden_method, tiny

from bench.diffusion import guide
from methods.dtr import DTR, random_masks, sliding_masks


def starts(masks):
    return masks.int().argmax(dim=1)


def test_outputs_and_guided_outputs_are_those_of_the_released_code():
    tensors, _ = golden("dtr")
    method = golden_method("dtr").requires_grad_(False)
    denoiser = method.specialise(method.intervals[0])
    assert_close(denoiser(tensors["x"], tensors["t"], tensors["y"]), tensors["out_eval"])
    assert_close(guide(denoiser, tensors["cfg_x"], tensors["cfg_t"], tensors["cfg_y"], 1.5, 4), tensors["out_cfg"])


def test_blocks_and_training_pass_are_those_of_the_released_code():
    tensors, _ = golden("dtr")
    method = golden_method("dtr")
    x, t, y = (tensors[name] for name in "xty")
    prediction = None

    def run():
        nonlocal prediction
        prediction = method(x, t, y, method.intervals[0])

    for index, tokens in enumerate(block_outputs(method, run)):
        assert_close(tokens, tensors[f"hid.block{index}"])
    assert_close(prediction.output, tensors["out_train"])
    loss = prediction.output.square().mean()
    assert_close(loss, tensors["loss_total"])
    loss.backward()
    assert_gradients(method, "dtr")


@pytest.mark.parametrize("width", [48, 192, 384, 768, 1024, 1152])
def test_masks_at_every_published_width(width):
    tensors, facts = golden("dtr")
    masks = sliding_masks(1000, width, 4.0, 0.8)
    assert torch.equal(starts(masks), tensors[f"mask.unit{width}.start_all"])
    active = masks.sum(dim=1)
    assert (active == facts["mask_active_count_by_width"].get(str(width), 38)).all()
    assert (masks.int().diff(dim=1).abs().sum(dim=1) <= 2).all()  # one window, without holes


def test_masks_at_another_alpha_and_schedule():
    tensors, _ = golden("dtr")
    assert torch.equal(sliding_masks(1000, 48, 4.0, 0.8)[tensors["mask.unit48.rows"]].float(), tensors["mask.unit48"])
    assert torch.equal(sliding_masks(50, 48, 2.0, 0.8).float(), tensors["mask.t50.unit48.alpha2"])


def test_window_slides_from_the_first_channel_to_the_last():
    masks = sliding_masks(100, 40, 4.0, 0.5)
    assert masks[0, :20].all()
    assert masks[-1, 20:].all()
    assert (starts(masks).diff() >= 0).all()
    assert sliding_masks(1, 8, 4.0, 0.5).sum() == 4


def test_random_masks_differ_by_block_and_timestep_and_depend_on_the_seed_alone():
    masks = random_masks(3, 50, 32, 0.8, seed=1)
    assert (masks.sum(dim=-1) == 25).all()
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0, 0], masks[0, 1])
    torch.manual_seed(5)
    assert torch.equal(masks, random_masks(3, 50, 32, 0.8, seed=1))
    assert not torch.equal(masks, random_masks(3, 50, 32, 0.8, seed=2))
    assert masks.float().mean(dim=(0, 1)).std() < 0.1  # no channel is preferred


def test_random_routing_uses_the_mask_of_each_block():
    method = tiny("dtr random").requires_grad_(False)
    x, t, y = batch(method.intervals[0])
    before = method.denoise(x, t, y)
    method.masks[1] = ~method.masks[1]
    assert (method.denoise(x, t, y) - before).abs().max() > 1e-3


def test_beta_one_is_dense():
    method, dense = tiny("dtr", beta=1.0), tiny("dense")
    method.load_dense(dense.network.state_dict())
    x, t, y = batch(method.intervals[0])
    assert torch.equal(method(x, t, y, method.intervals[0]).output, dense.network(x, t, y))


def test_masked_channels_are_not_read_by_the_branches():
    method = tiny("dtr").requires_grad_(False)
    block, mask = method.network.blocks[0], method.masks[0, 5].float()
    tokens, condition = torch.randn(1, 4, TINY.width), torch.randn(1, TINY.width)
    change = (1 - mask) * torch.randn(TINY.width)
    routed = [block(x, condition, mask) for x in (tokens, tokens + change)]
    assert_close(routed[1] - routed[0], change.expand_as(tokens), 1e-6)


@pytest.mark.parametrize("variant", ["dtr", "dtr random"])
def test_nothing_is_computed_between_blocks(variant):
    """What is outside of a block is not compiled with it."""
    method = tiny(variant)
    entering: list[torch.Tensor] = []
    for block in method.network.blocks:
        block.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    leaving = block_outputs(method, lambda: method(*batch(method.intervals[0]), method.intervals[0]))
    assert all(one is other for one, other in zip(entering[1:], leaving, strict=False)) and len(entering) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 0.0}, "beta is 0.0"), ({"beta": 1.2}, "beta is 1.2"), ({"alpha": -1}, "alpha"), ({"routing": "x"}, "routing")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DTR(TINY, num_timesteps=NUM_TIMESTEPS, **options)
