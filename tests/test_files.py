"""Are small files whole whenever anybody looks, and is damage named?"""

import os
from pathlib import Path
from typing import NoReturn

import pytest

from bench.files import read_json, read_text, write_bytes_atomically, write_json_atomically


def test_what_was_written_is_read_and_what_is_not_there_is_empty(tmp_path: Path) -> None:
    write_json_atomically(tmp_path / "a.json", {"loss": 0.5})
    assert read_json(tmp_path / "a.json", dict) == {"loss": 0.5}
    for missing in (tmp_path / "b.json", tmp_path / "a.json" / "b.json"):
        assert read_json(missing, list) == [] and read_text(missing) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_appears_while_one_looks_was_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the claim of another launcher does."""

    def appears(path: Path, *_: object, **__: object) -> NoReturn:
        path.touch()
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", appears)
    assert read_json(tmp_path / "a.json", dict) == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is no JSON"), (b'{"loss": 0.', "is no JSON"), (b"[1]", "holds a list, not a dict"), (b"\xff\xfe", "no UTF-8 text")],
)
def test_damage_is_one_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*a.json [^\n]*{words}: delete it and run this again$"):
        read_json(tmp_path / "a.json", dict)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_bytes_atomically(path, b"before")

    def full(descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes_atomically(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
