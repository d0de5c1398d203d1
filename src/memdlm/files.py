"""Files and folders that outlive a crash or a full disk: synced, sealed, told whole from broken.

A sealed folder holds a marker, written last, with the size and a hash of every other file. What has
no marker, or differs from it, was not written to its end.
"""

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MARKER = "complete.json"

_FULL = {errno.ENOSPC, errno.EDQUOT}
# safetensors and torch report a full disk in words of their own.
_FULL_TEXTS = (
    "No space left on device",
    "os error 28",
    "PytorchStreamWriter failed writing",
    "inline_container",
)


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, or one that it hides, says that there is no space left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(text in str(seen) for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def content_hash(path: Path) -> str:
    """Return the BLAKE2b hash (128 bits, in hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder; its files they do sync.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk, the folder's own names included."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file so that after a crash it holds the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def seal(folder: Path) -> None:
    """Sync a folder and write its marker; whatever is added later is not covered."""
    sync_tree(folder)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = sorted(name for name in names if name != MARKER)
    with ThreadPoolExecutor(max_workers=4) as threads:  # hashing releases the interpreter's lock
        hashes = list(threads.map(lambda name: content_hash(folder / name), names))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "blake2b": digest}
        for name, digest in zip(names, hashes, strict=True)
    }
    write_text(folder / MARKER, json.dumps({"files": files}, indent=1) + "\n")


def defect(folder: Path, *, read: bool = True) -> str | None:
    """Return what is wrong with a sealed folder, in words that follow "because"; None if whole.

    Args:
        folder: The folder that should be whole.
        read: Compare the bytes of every file too; otherwise the sizes alone.
    """
    try:
        files: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        listed = [(name, int(row["bytes"]), str(row["blake2b"])) for name, row in files.items()]
    except FileNotFoundError:
        return f"it has no {MARKER}, so it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} cannot be read"
    for name, size, digest in listed:
        path = folder / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size:,} of {size:,} bytes"
        if read and content_hash(path) != digest:
            return f"the bytes of its {name} are not those that were written"
    return None
