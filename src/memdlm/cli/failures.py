"""Turns exceptions into one line with the fix. Knows messages, imports nothing heavy."""

import errno

from memdlm.errors import MemDLMError
from memdlm.files import is_disk_full

_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def describe_failure(error: BaseException) -> tuple[str, int]:
    """Return the line to print for an error, and the exit code."""
    if isinstance(error, MemDLMError):
        return str(error), error.exit_code
    if is_disk_full(error):
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        return f"the disk is full{where}: free some space and start again (train: --resume)", 1
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        place = f" {error.filename}" if error.filename else ""
        fix = "check the rights, or choose another place"
        if error.errno not in _DENIED:
            fix = "check the path"
        return f"cannot read or write{place} ({reason}): {fix}", 1
    if isinstance(error, ImportError):
        return f"a package is missing ({error}): install it, or leave out the setting", 1
    if _is_out_of_memory(error):
        return (
            "the device's memory is full: lower the batch size, data.max_length or "
            "memory.layer_fraction, or set training.gradient_checkpointing: true",
            1,
        )
    if _has_lost_another(error):
        return (
            "another process of this run has ended, so this one cannot go on: its own message is "
            "the cause; start again with --resume",
            1,
        )
    return (
        f"unexpected {type(error).__name__}: {error}; run again with --debug and report it with "
        "the output of `memdlm env`",
        1,
    )


def _has_lost_another(error: BaseException) -> bool:
    # gloo raises plain RuntimeErrors, NCCL and the store errors of their own.
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    signs = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
