"""Does an autoencoder compute what diffusers computes, the same bits however images are cut, and refuse what it cannot be?"""

import json
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from autoencoders import SCALING, write_autoencoder
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import autoencoder as module
from bench.autoencoder import (
    CONFIG,
    TOGETHER,
    WEIGHTS,
    Autoencoder,
    Layout,
    check_loadable,
    digest_of,
    load_autoencoder,
    read_layout,
)

CPU = torch.device("cpu")
COUNT = 2 * TOGETHER + 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One to be damaged."""
    return write_autoencoder(tmp_path / "tiny")


def load(folder: Path) -> Autoencoder:
    return Autoencoder(read_layout(folder), CPU)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, NOISE = draw(COUNT, 3, 16, 16).clamp(-1, 1), draw(COUNT, 4, 8, 8)


def test_the_layout_is_what_the_configuration_says(tiny: Path, tmp_path: Path) -> None:
    assert read_layout(tiny) == Layout(tiny, 3, 4, 2, SCALING)
    other = write_autoencoder(tmp_path / "other", channels=1, latent_channels=2, levels=3)
    assert read_layout(other) == Layout(other, 1, 2, 4, SCALING)
    config = json.loads((other / CONFIG).read_text())  # as of stabilityai/sd-vae-ft-ema: older than what it lacks
    (other / CONFIG).write_text(json.dumps({key: config[key] for key in config if key != "scaling_factor"}))
    assert read_layout(other).scaling == 0.18215


def test_it_encodes_and_decodes_as_diffusers_does(tiny: Path) -> None:
    ours, theirs = load(tiny), AutoencoderKL.from_pretrained(tiny, low_cpu_mem_usage=False).eval()
    theirs.requires_grad_(False)  # PyTorch chooses products by it, even where no gradients are asked for
    with torch.no_grad():
        posteriors = [theirs.encode(x).latent_dist for x in X.split(TOGETHER)]
        latents, means = ours.encode(X, NOISE), ours.encode(X, torch.zeros_like(NOISE))
        assert latents.shape == (COUNT, 4, 8, 8) and ours.decode(latents).shape == X.shape
        assert torch.equal(means, torch.cat([posterior.mode() for posterior in posteriors]))
        std = torch.cat([posterior.std for posterior in posteriors])
        assert torch.equal(latents, means + std * NOISE) and std.min() > 0 and not torch.equal(latents, means)
        assert torch.equal(ours.decode(latents), torch.cat([theirs.decode(z).sample for z in latents.split(TOGETHER)]))


def test_images_go_through_it_in_equal_parts_however_many_there_are(tiny: Path) -> None:
    autoencoder = load(tiny)
    seen: list[int] = []
    autoencoder.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    latents = autoencoder.encode(X, NOISE)
    assert seen == [TOGETHER, TOGETHER, 3]
    for start in range(0, COUNT, TOGETHER):
        rows = slice(start, start + TOGETHER)
        assert torch.equal(autoencoder.encode(X[rows], NOISE[rows]), latents[rows])
        assert torch.equal(autoencoder.decode(latents[rows]), autoencoder.decode(latents)[rows])


def test_nothing_is_asked_of_a_network_and_nothing_is_printed_or_drawn(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as warned:
        autoencoder = load_autoencoder(read_layout(tiny), CPU)
        autoencoder.decode(autoencoder.encode(X, NOISE))
    assert torch.equal(torch.rand(3), expected) and warned == [] and capfd.readouterr() == ("", "")
    assert load_autoencoder(read_layout(tiny), CPU) is autoencoder
    assert not any(weight.requires_grad for weight in autoencoder.model.parameters()) and not autoencoder.model.training


def test_it_computes_in_float32_whatever_is_stored_or_set(folder: Path) -> None:
    exact = load(folder).encode(X, NOISE)
    weights = load_file(folder / WEIGHTS)
    save_file({name: weight.half() for name, weight in weights.items()}, folder / WEIGHTS)
    rounded = load(folder)
    found: list[tuple[str, bool]] = []
    rounded.model.encoder.register_forward_pre_hook(
        lambda *_: found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
    )
    before, allowed = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        latents = rounded.encode(X, NOISE)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = allowed
    assert set(found) == {("highest", False)}
    assert latents.dtype == torch.float32 and 0 < (latents - exact).abs().max() < 0.05


def test_attention_weights_by_the_names_of_older_files_are_the_same(folder: Path) -> None:
    """Those of stabilityai/sd-vae-ft-ema have them."""
    before = load(folder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, weight in load_file(folder / WEIGHTS).items():
        for new_name, old_name in old.items():
            name = name.replace(f".attentions.0.{new_name}.", f".attentions.0.{old_name}.")
        renamed[name] = weight
    assert sum(".attentions.0.key." in name for name in renamed) == 4
    save_file(renamed, folder / WEIGHTS)
    check_loadable(read_layout(folder))
    after = load(folder)
    latents = before.encode(X, NOISE)
    assert torch.equal(after.encode(X, NOISE), latents) and torch.equal(after.decode(latents), before.decode(latents))


def other_weights(folder: Path, bias: float) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, BIAS: weights[BIAS] + bias}, folder / WEIGHTS)


def test_the_digest_is_of_what_is_in_both_files(folder: Path, tmp_path: Path) -> None:
    first = digest_of(read_layout(folder))
    assert len(first) == 64 and set(first) <= set("0123456789abcdef")
    assert digest_of(read_layout(write_autoencoder(tmp_path / "copy"))) == first
    other_weights(folder, 1.0)
    second = digest_of(read_layout(folder))
    with_config(_name_or_path="elsewhere")(folder)
    assert len({first, second, digest_of(read_layout(folder))}) == 3


def test_weights_that_were_replaced_are_loaded_again(folder: Path) -> None:
    """Scores stand under the digest of the weights that are there."""
    layout = read_layout(folder)
    before = load_autoencoder(layout, CPU).decode(NOISE)
    other_weights(folder, 1.0)
    after = load_autoencoder(layout, CPU).decode(NOISE)
    assert torch.equal(after, load(folder).decode(NOISE)) and not torch.equal(after, before)


def test_what_can_be_loaded_is_checked_once_and_without_its_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, loaded, own, own_import = read_layout(folder), [], module._load, module._import_autoencoder
    monkeypatch.setattr(module, "_load", lambda *arguments: loaded.append(own(*arguments)))

    def import_autoencoder() -> type:
        assert not torch.empty(0).is_meta, "what diffusers makes when it is imported must have numbers"
        return own_import()

    monkeypatch.setattr(module, "_import_autoencoder", import_autoencoder)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for _ in range(3):
        check_loadable(layout)
    assert len(loaded) == 1 and all(tensor.is_meta for tensor in loaded[0].state_dict().values())
    assert torch.equal(torch.rand(3), expected)
    other_weights(folder, 1.0)
    check_loadable(layout)
    assert len(loaded) == 2


# What is refused


def with_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def with_weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


BIAS = "decoder.conv_in.bias"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), rf"there is no file .*{CONFIG}: give a folder"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), rf"there is no file .*{WEIGHTS}: give a folder"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read as JSON"),
    "no mapping": (lambda folder: (folder / CONFIG).write_text("[]"), "describes no model, not AutoencoderKL"),
    "another class": (with_config(_class_name="VQModel"), "describes VQModel, not AutoencoderKL"),
    "shifted": (with_config(shift_factor=0.1), "has a shift_factor for its latents"),
    "normalised": (with_config(latents_mean=[0.0, 1.0]), "has a latents_mean for its latents"),
    "words for numbers": (with_config(latent_channels="4"), "latent_channels '4'.* must be positive numbers"),
    "no scaling": (with_config(scaling_factor=0), "scaling_factor 0.* must be positive numbers"),
    "no levels": (with_config(block_out_channels=4), "block_out_channels 4.* a list"),
    "other channels out": (with_config(out_channels=1), "images of 3 channels to images of 1"),
    "unknown block": (with_config(down_block_types=["NoBlock"] * 2), "NoBlock does not exist"),
    "too many blocks": (with_config(down_block_types=["DownEncoderBlock2D"] * 3), "cannot be loaded"),
    "too few blocks": (with_config(down_block_types=["DownEncoderBlock2D"]), "Unexpected key"),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "cannot be loaded .*header"),
    "damaged weights": (cut_short, "cannot be loaded .*header"),
    "a weight missing": (with_weights(lambda w: {n: t for n, t in w.items() if n != BIAS}), f"Missing key.*{BIAS}"),
    "a weight too many": (with_weights(lambda w: {**w, "foo": torch.ones(1)}), "Unexpected key.*foo"),
    "a weight of another shape": (with_weights(lambda w: {**w, BIAS: torch.ones(5)}), f"size mismatch for {BIAS}"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_such_autoencoder_is_refused_in_one_sentence(
    damage: Callable[[Path], object], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where diffusers itself only warns, and goes on with layers that nothing has trained."""
    load(folder)
    damage(folder)
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*stabilityai/sd-vae-ft-ema$") as refused:
        load(folder)
    with pytest.raises(ValueError) as refused_before:
        check_loadable(read_layout(folder))
    assert str(refused_before.value) == str(refused.value)
    assert len(str(refused.value)) < 800 and capfd.readouterr() == ("", "")


def test_without_diffusers_it_is_said_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = read_layout(folder)
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.autoencoder_kl", None)
    for refuse in (lambda: Autoencoder(layout, CPU), lambda: check_loadable(layout)):
        with pytest.raises(ValueError, match=r"^latents need diffusers [^\n]*pip install 'timestep-bench\[latents\]'`$"):
            refuse()
