"""What a run was fed with, in hashes, so that a resumed run notices other data.

A file is hashed byte for byte; rows from the hub and generated ones as they are after encoding.
"""

import hashlib
from pathlib import Path

import numpy as np

from memdlm.cli.recipe import RecipeData
from memdlm.data.dataset import DataSplits, EncodedDataset
from memdlm.data.streaming import StreamedDataset
from memdlm.files import content_hash


def data_hashes(data: RecipeData, splits: DataSplits) -> dict[str, str]:
    """Return one BLAKE2b hash (128 bits, in hex) per source, under the name of its key."""
    train = data.train or "data.tasks"
    hashes = {"data.train": _hash(train, splits.train)}
    # Rows held out of the training source have no source of their own.
    if splits.eval is not None and (data.eval or not _is_file(train)):
        hashes["data.eval"] = _hash(data.eval or train, splits.eval)
    return hashes


def changed_data(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return the names of the sources that are not what they were."""
    names = dict.fromkeys([*before, *after])
    return [name for name in names if before.get(name) != after.get(name)]


def _is_file(source: str) -> bool:
    return Path(source).expanduser().is_file()


def _hash(source: str, rows: EncodedDataset | StreamedDataset) -> str:
    if _is_file(source):
        return content_hash(Path(source).expanduser())
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(rows, StreamedDataset):  # hub rows that nobody has seen yet: only their name
        digest.update(source.encode())
        return digest.hexdigest()
    for example in rows.examples:
        ids = np.asarray(example.input_ids, dtype=np.int64)
        digest.update(np.array([len(ids), example.prompt_length], dtype=np.int64).tobytes())
        digest.update(ids.tobytes())
    return digest.hexdigest()
