"""How is a small file written so that nobody sees half of it, and read so that damage is named?"""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to disk and rename it: a reader sees all of it or what was there before."""
    write_bytes_atomically(path, text.encode())


def write_json_atomically(path: Path, value: Any) -> None:
    """As `write_text_atomically`. NaN and infinities are written as Python's json does."""
    write_text_atomically(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json_atomically` writes."""
    return json.dumps(value, indent=2) + "\n"


def write_bytes_atomically(path: Path, content: bytes) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """ValueError in one sentence if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {path} ({error.strerror}): choose a folder that can be written") from None


def read_json(path: Path, kind: type) -> Any:
    """A JSON file of a dict or a list; empty if it does not exist."""
    text = _text_in(path)
    if text is None:
        return kind()
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"{path} is damaged, as it is no JSON: delete it and run this again") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a {kind.__name__}: delete it and run this again")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The tree in a YAML file; ValueError in one sentence if it is missing or is no YAML mapping."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: check the path") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as YAML ({where}{reason}): mend or replace it") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}: give a mapping of keys to values")
    return {str(key): value for key, value in tree.items()}


def read_text(path: Path) -> str:
    """Empty if it does not exist."""
    return _text_in(path) or ""


def _text_in(path: Path) -> str | None:
    """None if it does not exist: told by the one look that reads it, as another process may be about to write it."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged, as it is no UTF-8 text: delete it and run this again") from None
