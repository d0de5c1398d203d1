"""What reading any part of a checkpoint shares: does it exist, and what went wrong in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from safetensors import SafetensorError

from memdlm.errors import CheckpointError

# What transformers, PEFT and safetensors raise on files that are missing, damaged or foreign.
_READING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    UserWarning,
    SafetensorError,
)
_HUB_TIMEOUT = 5.0  # seconds


def check_exists(name: str) -> None:
    """Refuse what looks like a path and is no folder, before it is looked up on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if path.exists():
        raise CheckpointError(f"{name} is a file: name the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise CheckpointError(f"no model folder at {name or '(an empty path)'}: check the path")


@contextmanager
def readable(name: str, what: str) -> Iterator[None]:
    """Turn whatever reading a checkpoint raises into one line that names it; our own errors pass.

    While the hub does not answer, only what it has left on this machine is read: the hub's own
    client would try every file again for half a minute.
    """
    try:
        with _without_retries(name):
            yield
    except CheckpointError as error:
        if name in str(error):
            raise
        raise CheckpointError(f"{name}: {error}") from error
    except _READING_ERRORS as error:
        where = "folder" if Path(name).is_dir() else "local folder or reachable hub model"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"cannot load the {what} from {name} ({reason[:300]}): check that it is a complete "
            f"{where}"
        ) from error


def read_config(name: str, what: str = "model") -> dict[str, Any]:
    """Return the fields of config.json in folder or hub name `name`.

    Raises:
        CheckpointError: There is none, it cannot be read, or it is no JSON object.
    """
    from transformers import PreTrainedConfig

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise CheckpointError(f"{name} holds no config.json: name the folder of a saved model")
    with readable(name, what):
        try:
            fields: Any = PreTrainedConfig.get_config_dict(name)[0]
        except AttributeError:  # how it fails on JSON that is a list or a number
            fields = None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{name}: config.json is no JSON object: download it again")
    return fields


@contextmanager
def _without_retries(name: str) -> Iterator[None]:
    from huggingface_hub import constants

    if Path(name).is_dir() or constants.HF_HUB_OFFLINE or _hub_answers():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _hub_answers() -> bool:
    """Ask the hub once, through proxies if the environment names some."""
    from huggingface_hub import constants

    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_TIMEOUT).close()
    except HTTPError:
        return True  # an answer, if an unfriendly one
    except URLError as error:
        # The client may trust other certificates than Python does: let it find out.
        return isinstance(error.reason, SSLError)
    except OSError:
        return False
    return True
