"""Are the embedded digits, and the classifier that scores them, what they should be?"""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from bench.config import DataConfig
from bench.data import DataSource, digits_classifier, load_data

DIGITS_HASH = "e9573cf6360fddb573127d1e752b85fb8be4454ad06af5a802ee8e1f7a25f4b8"


@pytest.fixture(scope="module")
def digits() -> DataSource:
    return load_data(DataConfig())


def everything(source: DataSource, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = getattr(source, part)
    return images.batch(torch.arange(len(images)))


def test_digits_split_is_pinned(digits: DataSource) -> None:
    assert digits.content_hash == DIGITS_HASH
    assert (digits.num_classes, digits.channels, digits.input_size, digits.pixels) == (10, 1, 8, True)
    assert (len(digits.train), len(digits.heldout)) == (1297, 500)


def test_digits_are_disjoint_and_complete(digits: DataSource) -> None:
    rows = torch.cat([everything(digits, part)[0].flatten(1) for part in ("train", "heldout")])
    assert len(rows.unique(dim=0)) == 1797


def test_digits_are_in_range_and_held_out_in_balanced_order(digits: DataSource) -> None:
    for part in ("train", "heldout"):
        x, y = everything(digits, part)
        assert x.dtype == torch.float32 and x.shape[1:] == (1, 8, 8)
        assert x.min() == -1 and x.max() == 1
        assert torch.equal(y, getattr(digits, part).labels)
    assert torch.equal(digits.heldout.labels, torch.arange(500) % 10)


def test_digits_batch_follows_the_indices(digits: DataSource) -> None:
    x, y = everything(digits, "train")
    indices = torch.tensor([5, 1200, 5])
    batch_x, batch_y = digits.train.batch(indices)
    assert torch.equal(batch_x, x[indices]) and torch.equal(batch_y, y[indices])


@pytest.mark.parametrize("config", [DataConfig(image_size=16), DataConfig(path="somewhere")])
def test_digits_refuse_what_they_do_not_have(config: DataConfig) -> None:
    with pytest.raises(ValueError, match="digits"):
        load_data(config)


# --- the digits classifier


def test_classifier_recognises_heldout_digits() -> None:
    accuracy, loss = digits_classifier.accuracy_and_loss(digits_classifier.load_classifier())
    assert accuracy >= 0.97
    assert loss < 0.05  # calibrated: confidence that is not borne out would cost more


def test_classifier_file_is_small_and_must_be_the_shipped_one(tmp_path: Path) -> None:
    assert digits_classifier.WEIGHTS_PATH.stat().st_size < 300_000
    other = tmp_path / "other.safetensors"
    other.write_bytes(safetensors.torch.save(digits_classifier.DigitsClassifier().state_dict()))
    with pytest.raises(ValueError, match="restore the shipped file"):
        digits_classifier.load_classifier(other)
    with pytest.raises(ValueError, match="there is no file"):
        digits_classifier.load_classifier(tmp_path / "missing.safetensors")


def test_classifier_training_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = digits_classifier.train_classifier(seed=3, epochs=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = digits_classifier.train_classifier(seed=3, epochs=1).state_dict()
    other = digits_classifier.train_classifier(seed=4, epochs=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
