"""Is a checkpoint whole or refused, whatever happens to the disk or to the process that writes it?"""

import pickle

import pytest
import torch

from bench import checkpoint

COUNTERS = {"steps_done": 3, "updates": [1, 2], "lost": {"images": 0, "device_seconds": 0.25}}


def tensors(fill: float = 1.5) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((3, 4), fill),
        "strided": torch.arange(6.0).reshape(2, 3).T,
        "step": torch.tensor(7.0),
        "mask": torch.tensor([True, False]),
        "index": torch.tensor([3, 1]),
        "half": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
    }


def test_what_was_saved_is_what_is_loaded(tmp_path):
    path = checkpoint.save(tmp_path / "deep" / "folder", 3, tensors(), COUNTERS)
    found = checkpoint.load(path)
    assert found.counters == COUNTERS and found.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor), name
    assert checkpoint.load_latest(tmp_path / "deep" / "folder") is not None
    assert checkpoint.load_latest(tmp_path / "nothing here") is None


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 10, 9_999_999, 123_456_789):
        checkpoint.save(tmp_path, step, tensors(step), {"steps_done": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-009999999.safetensors", "step-123456789.safetensors"]
    assert checkpoint.load_latest(tmp_path).counters == {"steps_done": 123_456_789}


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "empty":
        content = bytearray()
    elif how == "cut short":
        content = content[: len(content) // 2]
    elif how == "last byte gone":
        content = content[:-1]
    elif how == "longer":
        content += b"\0"
    elif how == "flipped weight":
        content[-3] ^= 1
    elif how == "flipped counter":
        content = bytearray(bytes(content).replace(b'steps_done\\": 2', b'steps_done\\": 6'))
    elif how == "zeros":
        content = bytearray(len(content))
    assert bytes(content) != path.read_bytes()
    path.write_bytes(bytes(content))


DAMAGES = ("empty", "cut short", "last byte gone", "longer", "flipped weight", "flipped counter", "zeros")


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_passed_over_with_a_warning(how, tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {"steps_done": step})
    newest, before = reversed(checkpoint.list_checkpoints(tmp_path))
    damage(newest, how)
    with pytest.raises(ValueError, match=f"^checkpoint {newest} (cannot be read|is damaged)[^\n]*$"):
        checkpoint.load(newest)
    with pytest.warns(UserWarning, match=f"^checkpoint {newest} ") as warned:
        found = checkpoint.load_latest(tmp_path)
    assert len(warned) == 1 and found.counters == {"steps_done": 1} and torch.equal(found.tensors["weight"], tensors(1)["weight"])
    damage(before, "empty")
    with pytest.raises(ValueError, match=f"^every checkpoint in {tmp_path} is damaged: [^\n]*$"):
        checkpoint.load_latest(tmp_path)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 2  # nothing is removed by reading


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Every bit that says something: one that is only alignment or spelling of the header changes nothing that is read."""
    path = checkpoint.save(tmp_path, 3, tensors(), COUNTERS)
    content, whole = path.read_bytes(), checkpoint.load(path)
    refused = 0
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = checkpoint.load(path)
        except ValueError:
            refused += 1
            continue
        assert found.counters == whole.counters and found.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in found.tensors.items())
    assert refused > 0.9 * 8 * len(content)


def test_checkpoints_after_a_damaged_one_push_it_out(tmp_path):
    """A run that went back and writes at other steps must not leave the damaged file as one of its last two."""
    for step in (4, 8):
        checkpoint.save(tmp_path, step, tensors(step), {"steps_done": step})
    damage(tmp_path / "step-000000008.safetensors", "cut short")
    checkpoint.save(tmp_path, 5, tensors(5), {"steps_done": 5})
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-000000004.safetensors",
        "step-000000005.safetensors",
    ]
    assert checkpoint.load_latest(tmp_path).counters == {"steps_done": 5}


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tensors(), {"steps_done": 1})

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a check")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, tensors(), {"steps_done": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.safetensors"]
    assert checkpoint.load_latest(tmp_path).counters == {"steps_done": 1}


def test_what_a_killed_process_left_half_written_is_ignored_and_removed(tmp_path):
    checkpoint.save(tmp_path, 4, tensors(), {"steps_done": 4})
    (tmp_path / "step-000000008.tmp").write_bytes(b"half a check")
    assert checkpoint.load_latest(tmp_path).counters == {"steps_done": 4}
    checkpoint.save(tmp_path, 6, tensors(), {"steps_done": 6})
    assert not list(tmp_path.glob("*.tmp"))


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_loading_executes_nothing(tmp_path):
    for step, write in ((1, torch.save), (2, lambda bomb, path: path.write_bytes(pickle.dumps(bomb)))):
        write(Bomb(tmp_path / "exploded"), tmp_path / f"step-{step:09d}.safetensors")
    with pytest.raises(ValueError, match="every checkpoint"):
        checkpoint.load_latest(tmp_path)
    assert not (tmp_path / "exploded").exists()
    live = (tmp_path / "step-000000001.safetensors").rename(tmp_path / "live.pt")
    torch.load(live, weights_only=False).close()
    assert (tmp_path / "exploded").exists()
