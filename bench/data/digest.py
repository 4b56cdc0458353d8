"""When need a data set not be read to know the hash of its contents?

Once it has been read, its hash is believed as long as all its files have the same paths, sizes and times of change (of what is
in them, and of the files themselves, which nobody can set back): in the process that has read it, and in a folder of digests
for all others, as git does with its index. What changed shortly before it was looked at could change again without another
time, and what is small is soon read: neither is kept in the folder.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench.config import content_hash
from bench.files import make_folder, read_json, write_json_atomically

VERSION = 1  # of how data sets are hashed: another number with every change, so that no hash of before is believed
RACY_SECONDS = 60.0  # more than the steps of a file system's clock (2 s), and what its clock may differ from ours
KEPT_FROM_BYTES = 250_000_000  # fewer are hashed within about a second
_HASHES: dict[str, str] = {}  # of this process: stamp -> hash


class Stamp(NamedTuple):
    """Not what is in files, but whether to look again."""

    key: str  # the same for files of the same paths, sizes and times of change
    num_bytes: int
    is_settled: bool  # none of them changed shortly before


def stamp(files: Iterable[Path], what: str = "") -> Stamp:
    """Of these files, of which `what` is made."""
    now, num_bytes, newest = time.time(), 0, 0.0
    digest = hashlib.sha256(f"{VERSION} {what}".encode())
    for path in files:
        found = path.stat()
        digest.update(f"{path.absolute()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns};".encode())
        num_bytes += found.st_size
        newest = max(newest, found.st_mtime, found.st_ctime)
    return Stamp(digest.hexdigest(), num_bytes, newest < now - RACY_SECONDS)


def hashed_once(stamped: Stamp, fingerprint: Callable[[], str], folder: Path | None = None) -> str:
    """`fingerprint()`, which reads all that is stamped, unless this process has done that, or another one that kept its hash in
    `folder`.
    """
    if stamped.key not in _HASHES:
        may_keep = stamped.is_settled and stamped.num_bytes >= KEPT_FROM_BYTES
        path = folder / f"data-{stamped.key[:20]}.json" if folder and may_keep else None
        known = _read(path, stamped) if path else None
        _HASHES[stamped.key] = known or fingerprint()
        if path and not known:
            make_folder(path.parent)
            write_json_atomically(path, _record(stamped, _HASHES[stamped.key]))
    return _HASHES[stamped.key]


def _read(path: Path, stamped: Stamp) -> str | None:
    """None if there is no such file. A damaged one is made anew, with a warning."""
    if not path.exists():
        return None
    try:
        found = read_json(path, dict)
    except ValueError:
        found = {}
    if found != _record(stamped, str(found.get("sha256"))):
        warnings.warn(f"{path} is damaged: the data set is read and hashed again", stacklevel=2)
        return None
    return str(found["sha256"])


def _record(stamped: Stamp, sha256: str) -> dict[str, Any]:
    return {"sha256": sha256, "stamp": stamped.key, "check": content_hash([sha256, stamped.key])}
