"""Look at the weight files of a local checkpoint before anything reads them whole.

A truncated or missing shard of a large checkpoint is named at once, not after minutes; and a
pickle, which runs code when it is read, is never opened.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from memdlm.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin*", "*.pt", "*.pth", "*.ckpt")
_POINTER = b"version https://git-lfs"


def check_weight_files(folder: Path) -> None:
    """Refuse a folder whose safetensors files are not all there and whole.

    Reads the index and the header of every shard, which also tells the size a shard must have.

    Raises:
        CheckpointError: There are no weights, only pickled ones, or a file is missing or damaged.
    """
    if (folder / _SINGLE).is_file():
        names = [_SINGLE]
    elif (folder / _INDEX).is_file():
        names = _shards(folder)
    else:
        raise CheckpointError(_no_safetensors(folder))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its {len(names)} weight files ({shown}): download "
            "them again"
        )
    for name in names:
        _check_whole(folder / name)


def _shards(folder: Path) -> list[str]:
    """Return the file names of a sharded checkpoint, in order."""
    try:
        index: Any = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
        # A name with a folder in it would reach outside of the checkpoint.
        if not files or any(Path(name).name != name for name in files):
            raise ValueError("no file names in weight_map")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / _INDEX} is damaged ({_reason(error)}): download it again"
        ) from error
    return sorted(files)


def _check_whole(path: Path) -> None:
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
        if not is_pointer:
            with safe_open(path, framework="pt"):
                return
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({_reason(error)}): download it again"
        ) from error
    raise CheckpointError(
        f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
    )


def _no_safetensors(folder: Path) -> str:
    pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
    if not pickles:
        return f"{folder} holds no weights: there is neither {_SINGLE} nor {_INDEX}"
    return (
        f"{folder} holds its weights as a pickle ({pickles[0]}), which could run code and is never "
        "read: use safetensors, or convert a file that you trust with "
        "`safetensors.torch.save_file(torch.load(path, weights_only=True), "
        f'"{_SINGLE}", metadata={{"format": "pt"}})`'
    )


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
