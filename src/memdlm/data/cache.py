"""Encoded rows on disk, under a hash of all that they depend on: bytes, tokenizer, settings.

A file is a line of JSON (a digest of all that follows, and a description of each split), then int32
numbers: per split the rows' lengths, their prompt lengths, and all ids. It is written aside and
renamed, so that a reader, or another process, sees a whole file or none; one that its digest does
not fit is reported and written anew. The folder can be deleted at any time.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from memdlm.data.config import DataConfig
from memdlm.data.encoding import Example
from memdlm.data.readers import is_file_source, load_hub
from memdlm.errors import DataError
from memdlm.files import content_hash, sync

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised when encoding changes, so that files of an older version are not found.
_VERSION = 1
# Settings that change neither which rows there are nor their ids; sources count by content.
_IRRELEVANT = {"train", "eval", "cache", "streaming", "shuffle_buffer"}
_PACKAGES = ("tokenizers", "transformers", "jinja2")


@dataclass(frozen=True)
class CachedSplit:
    """The encoded rows of one split and its description, plain data for JSON."""

    examples: list[Example]
    about: dict[str, Any]


def cache_folder() -> Path:
    """Return `MEMDLM_CACHE`, or `memdlm` in the user's cache folder; it may not exist."""
    own = os.environ.get("MEMDLM_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "memdlm"


def cache_file(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Path | None:
    """Return where the encoded rows of a configuration belong, whether or not they are there.

    None where not all that they depend on can be hashed: a tokenizer that is not a fast one, a chat
    template that asks for the time, hub data that are not in files.

    Raises:
        DataError: A source cannot be read.
    """
    about_tokenizer = _tokenizer_fingerprint(tokenizer)
    sources = [_source_fingerprint(s) for s in (config.train, config.eval) if s is not None]
    if about_tokenizer is None or None in sources:
        return None
    settings = {
        f.name: getattr(config, f.name) for f in fields(DataConfig) if f.name not in _IRRELEVANT
    }
    parts = [
        _VERSION,
        {name: version(name) for name in _PACKAGES},
        about_tokenizer,
        sources,
        settings,
    ]
    text = json.dumps(parts, sort_keys=True)
    key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return cache_folder() / "encoded" / f"{key}.rows"


def write_cache(path: Path, splits: Sequence[CachedSplit]) -> None:
    """Write splits to `path`, wholly or not at all.

    Raises:
        OSError: The folder cannot be written to, or the disk is full.
    """
    arrays = []
    about = []
    for split in splits:
        rows = split.examples
        about.append({"num_rows": len(rows), "about": split.about})
        arrays.append(np.array([len(row.input_ids) for row in rows], dtype=np.int32))
        arrays.append(np.array([row.prompt_length for row in rows], dtype=np.int32))
        arrays += [np.asarray(row.input_ids, dtype=np.int32) for row in rows]
    body = np.concatenate(arrays)
    header = {"blake2b": _digest(about, body), "splits": about}
    path.parent.mkdir(parents=True, exist_ok=True)
    # A random name: processes that share the folder may be on several machines, with equal ids.
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            body.tofile(file)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_cache(path: Path) -> list[CachedSplit]:
    """Return the splits in a cache file.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read.
        ValueError: It is not what was written.
    """
    with path.open("rb") as file:
        try:
            header = json.loads(file.readline())
            about, digest = header["splits"], header["blake2b"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError("its first line is not what was written") from error
        data = file.read()
    if len(data) % 4:
        raise ValueError("it was cut short")
    body = np.frombuffer(data, dtype=np.int32)
    if _digest(about, body) != digest:
        raise ValueError("its bytes are not those that were written")
    splits = []
    start = 0
    for split in about:
        count = split["num_rows"]
        lengths = body[start : start + count]
        prompts = body[start + count : start + 2 * count]
        bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) + start + 2 * count
        examples = [
            Example(body[a:b], int(prompt))
            for a, b, prompt in zip(bounds[:-1], bounds[1:], prompts, strict=True)
        ]
        start = int(bounds[-1])
        splits.append(CachedSplit(examples, split["about"]))
    return splits


def _digest(about: list[dict[str, Any]], body: np.ndarray) -> str:
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(body).data)
    return digest.hexdigest()


def _source_fingerprint(source: str) -> list[str] | None:
    """Return what identifies a source's rows: its bytes, and what decides how they are read."""
    if is_file_source(source):
        path = Path(source).expanduser()
        if not path.is_file():
            return None  # reading it says what is wrong
        try:
            return [path.suffix.lower(), content_hash(path)]
        except OSError as error:
            raise DataError(
                f"cannot read {source} ({error.strerror}): check the path and its rights"
            ) from error
    # The Arrow files that `datasets` keeps of a hub data set; the source names split and slice.
    files = [Path(file["filename"]) for file in getattr(load_hub(source), "cache_files", ())]
    return [source, *map(content_hash, files)] if files else None


def _tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return a hash of everything that decides a tokenizer's ids, or None if that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = getattr(tokenizer, "chat_template", None)
    if backend is None or "strftime_now" in str(template):
        return None
    state = json.loads(backend.to_str())
    # Left over from the last call, and set anew by each.
    for key in ("truncation", "padding"):
        state.pop(key, None)
    special = {
        name: getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad", "mask", "unk")
    }
    text = json.dumps([type(tokenizer).__name__, state, template, special], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
