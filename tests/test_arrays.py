"""Is a trajectory read as it was written, and is damage named?"""

from pathlib import Path

import numpy as np
import pytest

from bench.arrays import Trajectory, read_trajectory, write_trajectory


def some_trajectory() -> Trajectory:
    draw = np.random.default_rng(0)
    images, predicted = (draw.integers(0, 256, (3, 2, 1, 4, 4), dtype=np.uint8) for _ in range(2))
    return Trajectory(images, predicted, np.array([39.0, 20.0, np.nan]), np.array([0, 1]))


def test_a_trajectory_comes_back_and_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    assert read_trajectory(tmp_path) is None
    write_trajectory(tmp_path, some_trajectory())
    found = read_trajectory(tmp_path)
    assert found is not None
    for one, other in zip(found, some_trajectory(), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    before = (tmp_path / "trajectory.npz").read_bytes()
    write_trajectory(tmp_path, some_trajectory())
    assert (tmp_path / "trajectory.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["trajectory.npz"]


def test_a_damaged_trajectory_is_named(tmp_path: Path) -> None:
    file = tmp_path / "trajectory.npz"
    write_trajectory(tmp_path, some_trajectory())
    whole = file.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"trajectory.npz is damaged.*delete it"):
            read_trajectory(tmp_path)
    np.savez(file, images=np.zeros(3))
    with pytest.raises(ValueError, match=r"trajectory.npz lacks predicted, times, labels: delete it"):
        read_trajectory(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros((3, 2, 1, 4, 4))},
        {"predicted": np.zeros((3, 2, 4, 4), dtype=np.uint8)},
        {"times": np.array([1.0, np.nan])},
        {"labels": np.array([0, 1, 2])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arrays_that_do_not_belong_together_are_refused(change: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_trajectory(tmp_path, some_trajectory()._replace(**change))
    with pytest.raises(ValueError, match="holds no uint8 images"):
        read_trajectory(tmp_path)
