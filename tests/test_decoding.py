"""Are runs on latents drawn, scored and shown as the images that an autoencoder makes of them?"""

from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from autoencoders import SCALING, write_autoencoder
from command import TINY, Outcome, assert_refused, train, tsbench
from test_fidelity import random_inception

from bench import adm, job
from bench.autoencoder import digest_of, load_autoencoder, read_layout
from bench.config import DataConfig, EvaluationConfig
from bench.data import DataSource, load_data, to_uint8
from bench.data.packed import pack
from bench.evaluate import METRICS, protocol_of, why_no_floor
from bench.files import read_json, write_json_atomically
from bench.pixels import decoder_of, pixels_of
from bench.runs import read_run
from bench.sample import make_sampler
from slurm.claims import Work
from slurm.states import NOTHING, status_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of digits' shape: 8x8 in one channel become 4x4 in four."""
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "tiny", channels=1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of latents that could be those of digits."""
    root = tmp_path_factory.mktemp("data") / "latents"
    digits = load_data(DataConfig())
    write_latents(root, digits.train.labels.numpy(), digits.heldout.labels.numpy())
    return ["data.name=latents", f"data.path={root}"]


def write_latents(root: Path, train: np.ndarray, heldout: np.ndarray) -> None:
    """4x4 in four channels, of these labels."""
    root.mkdir()
    draw = np.random.default_rng(0)
    for part, labels in (("train", train), ("heldout", heldout)):
        np.save(root / f"{part}_latents.npy", draw.normal(size=(len(labels), 4, 4, 4)).astype(np.float16))
        np.save(root / f"{part}_labels.npy", labels)
    write_json_atomically(root / "meta.json", {"scaling": SCALING})


def scoring(autoencoder: Path, images: str | Path = "digits") -> list[str]:
    return [f"evaluation.autoencoder={autoencoder}", f"evaluation.images={images}"]


@pytest.fixture(scope="module")
def folder(settings: list[str], autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), *settings, *scoring(autoencoder))


def test_a_run_is_scored_on_decoded_samples(folder: Path, autoencoder: Path, settings: list[str]) -> None:
    (record,) = read_run(folder).evaluations
    assert record["metrics"].keys() == {*METRICS, "class_accuracy", "n"} - {"sfid"}
    digits = load_data(DataConfig())
    protocol = record["protocol"]
    assert (protocol["data"], protocol["data_sha256"]) == ("digits", digits.content_hash)
    latents = load_data(job.make_config({}, settings).data)
    words = protocol["decoder"].split()
    assert words[:3] == ["diffusers", metadata.version("diffusers"), "AutoencoderKL"]
    assert words[3:] == [digest_of(read_layout(autoencoder)), "scaling", "0.5", "of", "latents", latents.content_hash]
    assert str(autoencoder) not in str(protocol)

    config, data, method = job.load_trained(folder)
    plain = replace(make_sampler(config.diffusion, config.evaluation, config.model, data), decoder=None)
    latents = [x for x in drawn_latents(plain, method)]
    decoded = [load_autoencoder(read_layout(autoencoder), CPU).decode(x / SCALING) for x in latents]
    expected = torch.cat([to_uint8(x) for x in decoded])
    assert torch.equal(adm.read_images(folder / "samples.npz"), expected)
    assert expected.shape == (60, 1, 8, 8) and expected.unique().numel() > 20
    trajectory = np.load(folder / "trajectory.npz")
    assert trajectory["images"].shape[1:] == trajectory["predicted"].shape[1:] == (10, 1, 8, 8)
    assert np.array_equal(trajectory["images"][-1], expected[:10].numpy())


def drawn_latents(sampler, method) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Of each block, before it is decoded: seen where the last step is taken."""
    blocks = []
    original = type(sampler).pixels
    try:
        type(sampler).pixels = lambda self, x: (blocks.append(x), original(self, x))[1]
        sampler._draw_blocks(method, [0, 1], CPU)
    finally:
        type(sampler).pixels = original
    return blocks


def test_one_that_ended_without_scores_is_scored_afterwards(
    folder: Path, settings: list[str], autoencoder: Path, tmp_path: Path
) -> None:
    later = train(tmp_path, *settings)
    assert read_run(later).evaluations == [] and not (later / "samples.npz").exists()
    assert_refused(tsbench("evaluate", later), "holds latents", "evaluation.autoencoder")
    assert_refused(tsbench("sample", later, "--out", tmp_path / "drawn.png"), "holds latents", "evaluation.autoencoder")
    run, wanted = read_run(later), ({}, {"autoencoder": str(autoencoder)})  # of a suite
    states = [status_of([Work(later, later)], NOTHING, lambda _: [], run.config["budget"], each).state for each in wanted]
    assert states[0] == "done" != states[1], states
    assert tsbench("evaluate", later, *scoring(autoencoder)).code == 0
    assert read_run(later).evaluations[0]["metrics"] == read_run(folder).evaluations[0]["metrics"]
    assert (later / "samples.npz").read_bytes() == (folder / "samples.npz").read_bytes()
    assert (later / "trajectory.npz").read_bytes() == (folder / "trajectory.npz").read_bytes()
    assert tsbench("sample", later, "--out", tmp_path / "drawn.png", *scoring(autoencoder)).code == 0


def test_what_was_drawn_under_other_settings_does_not_take_the_place_of_a_runs_own(
    settings: list[str], autoencoder: Path, tmp_path: Path
) -> None:
    folder = train(tmp_path, *settings, *scoring(autoencoder))
    (folder / "samples.npz").unlink()
    assert tsbench("evaluate", folder, "evaluation.steps=4", "evaluation.block_size=1").code == 0
    assert len(read_run(folder).evaluations) == 2
    assert not (folder / "samples.npz").exists() and not (folder / "parts").exists()


def test_streamed_samples_have_the_same_scores(folder: Path, settings: list[str], autoencoder: Path, tmp_path: Path) -> None:
    streamed = train(tmp_path, *settings, *scoring(autoencoder), "system.keep_samples=10")
    assert read_run(streamed).evaluations[0]["metrics"] == read_run(folder).evaluations[0]["metrics"]


def test_tables_and_figures_show_decoded_images(folder: Path) -> None:
    for command in ("tables", "plots"):
        outcome = tsbench(command, folder.parent)
        assert outcome.code == 0, outcome.err
    figures = folder.parent / "figures"
    assert (figures / "samples.png").exists()
    assert "Latents, decoded." in read_json(figures / "captions.json", dict)["trajectories"]


def test_a_suite_that_names_no_autoencoder_has_tables_of_runs_scored_afterwards(
    settings: list[str], autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = yaml.safe_load(job.make_config({}, [*TINY, *settings]).to_yaml())
    Path("mine.yaml").write_text(yaml.safe_dump({"name": "mine", "base": base, "methods": [{"method": "dense"}]}))
    assert tsbench("sweep", "mine.yaml", "--cluster", "inline").code == 0
    (run,) = Path("results/runs").glob("dense-*")
    assert tsbench("evaluate", run, *scoring(autoencoder)).code == 0
    for command in ("tables", "plots", "collect"):
        outcome = tsbench(command, "mine.yaml")
        assert outcome.code == 0 and "no floor: the suite's data are latents" in outcome.err, outcome
    assert_refused(tsbench("demo", "--out", "out", *TINY, *settings), "holds latents", "evaluation.autoencoder")


def test_the_floor_of_decoded_samples_says_that_it_was_not_decoded(
    settings: list[str], autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = yaml.safe_load(job.make_config({}, [*TINY, *settings, *scoring(autoencoder)]).to_yaml())
    Path("mine.yaml").write_text(yaml.safe_dump({"name": "mine", "base": base, "methods": [{"method": "dense"}]}))
    assert tsbench("sweep", "mine.yaml", "--cluster", "inline").code == 0
    outcome = tsbench("tables", "mine.yaml")
    assert outcome.code == 0, outcome.err
    table = Path("results/mine/table.md").read_text()
    assert "| Real data |" in table and "They are not decoded" in table


def test_images_may_be_packed(settings: list[str], autoencoder: Path, tmp_path: Path) -> None:
    pack(load_data(DataConfig()), tmp_path / "packed")
    data = latents_of(settings)
    evaluation = EvaluationConfig(autoencoder=str(autoencoder), images=str(tmp_path / "packed"))
    pixels = pixels_of(evaluation, data)
    assert pixels is not None and (pixels.name, pixels.input_size, len(pixels.heldout)) == ("packed", 8, 500)


def latents_of(settings: list[str]) -> DataSource:
    return load_data(job.make_config({}, settings).data)


# A reference file alone, as papers on ImageNet have it


def test_with_a_reference_file_alone_what_needs_the_images_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, reference = tmp_path / "weights.pth", tmp_path / "reference.npz"
    torch.save(random_inception(monkeypatch), weights)
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048), arr_0=images)
    write_latents(tmp_path / "latents", np.arange(40) % 3, np.arange(20) % 3)
    data = load_data(DataConfig("latents", str(tmp_path / "latents")))
    given = EvaluationConfig(
        extractor="inception",
        extractor_weights=str(weights),
        reference=str(reference),
        autoencoder=str(write_autoencoder(tmp_path / "autoencoder")),
        num_samples=10,
        kid_subset_size=5,
    )
    pixels = pixels_of(given, data)
    assert pixels is not None
    protocol = protocol_of(given, pixels)
    assert (protocol.data, protocol.reference) == ("none", "adm") and " AutoencoderKL " in protocol.decoder
    assert why_no_floor(protocol, pixels).startswith("there are no images to compute a floor from")

    scoring = (
        f"evaluation.{name}={value}" for name, value in asdict(given).items() if value != getattr(EvaluationConfig(), name)
    )
    latents = ("data.name=latents", f"data.path={tmp_path / 'latents'}")
    folder = train(tmp_path / "runs", *latents, *scoring, "evaluation.block_size=10")
    (record,) = read_run(folder).evaluations
    assert record["metrics"].keys() == {*METRICS, "n"} - {"fid_heldout", "nearest_neighbour", "sfid"}
    assert record["protocol"]["reference_sha256"] == protocol.reference_sha256
    outcome = tsbench("tables", folder.parent)
    missing = "Missing (–): dense: FID (held-out), Class accuracy, Nearest-neighbour distance."
    assert outcome.code == 0 and missing in outcome.out, outcome
    without = replace(given, reference="")
    with pytest.raises(ValueError, match=r"no images to compare samples with: set evaluation\.images, or evaluation\.reference"):
        protocol_of(without, pixels_of(without, data) or data)


def test_what_decodes_decides_about_the_protocol(settings: list[str], autoencoder: Path, tmp_path: Path) -> None:
    data = latents_of(settings)
    evaluations = [
        EvaluationConfig(autoencoder=str(path), images="digits")
        for path in (autoencoder, write_autoencoder(tmp_path / "other", channels=1, seed=1))
    ]
    hashes = {protocol_of(given, pixels_of(given, source) or source).hash for given in evaluations for source in
              (data, replace(data, scaling=0.25))}  # fmt: skip
    assert len(hashes) == 4
    decoder = decoder_of(evaluations[0], data)
    assert decoder is not None and decoder.describe() == decoder_of(evaluations[0], data).describe()  # type: ignore[union-attr]


# What is refused


def refused(*settings: str) -> Outcome:
    return tsbench("train", "--runs", "nowhere", *TINY, *settings)


def test_what_does_not_fit_is_refused_in_one_sentence(settings: list[str], autoencoder: Path, tmp_path: Path) -> None:
    pixels_already = "digits are pixels already: leave it empty"
    assert_refused(refused(f"evaluation.autoencoder={autoencoder}"), "evaluation.autoencoder", pixels_already)
    assert_refused(refused("evaluation.images=digits"), "evaluation.images", pixels_already)
    assert_refused(refused(*settings, "evaluation.images=digits"), "without evaluation.autoencoder nothing is decoded")
    assert_refused(refused(*settings, "evaluation.curve_every=1"), "not scored without evaluation.autoencoder")
    assert_refused(refused(*settings, *scoring(tmp_path / "no")), "there is no file", "sd-vae-ft-ema")
    wide = write_autoencoder(tmp_path / "wide", channels=1, latent_channels=8)
    assert_refused(refused(*settings, *scoring(wide)), "8 channels", "have 4", "encoded with")
    large = write_autoencoder(tmp_path / "large", channels=1, levels=3)
    assert_refused(refused(*settings, *scoring(large)), "images of 1x8x8", "decoded to 1x16x16")
    assert_refused(refused(*settings, *scoring(autoencoder, tmp_path / "none")), "evaluation.images is", "there is no folder")
    alone = refused(*settings, f"evaluation.autoencoder={autoencoder}")
    assert_refused(alone, "no images to compare samples with: set evaluation.images")
    write_latents(tmp_path / "others", np.arange(1297) % 10, np.arange(500) % 10)
    others = ["data.name=latents", f"data.path={tmp_path / 'others'}"]
    assert_refused(refused(*others, *scoring(autoencoder)), "train part", "encoded from")
    damaged = write_autoencoder(tmp_path / "damaged", channels=1)
    weights = damaged / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(refused(*settings, *scoring(damaged)), "cannot be loaded")  # and nothing was trained for it
    assert not Path("nowhere").exists()
