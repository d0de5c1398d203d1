"""Load models and tokenizers, turning everything that can go wrong into one line.

Reads the official layout through `AutoModelForMaskedLM`; nothing in a checkpoint is executed. Every
weight must find its place: a partly loaded model trains and answers, only badly.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")

# Published tokenizers hold their mask token without saying that it is one.
KNOWN_MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>")

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

_TOKEN_IDS = ("mask_token_id", "pad_token_id", "eos_token_id")


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> nn.Module:
    """Load a checkpoint of a supported family, in evaluation mode.

    Args:
        name_or_path: Folder or hub name in the official layout; or a PEFT adapter folder, which
            brings its base model with it (a relative base path counts from that folder).
        dtype: Weights' type, one of `DTYPES` or a torch dtype; None and "auto" keep the file's.
        adapter: PEFT adapter folder or hub name to put on the model.
        device: Where the model goes; None leaves it on the CPU.
        tokenizer: Supplies special token ids that the config lacks (see `match_token_ids`).

    Raises:
        CheckpointError: The folder is missing or damaged, the hub cannot be reached, the
            architecture is not supported, a weight is missing or left over, or ids disagree.
        ConfigError: `dtype` is unknown.
    """
    name = str(name_or_path)
    if adapter is None and (Path(name) / "adapter_config.json").is_file():
        name, adapter = _base_of_adapter(Path(name)), name
    model = _load_base(name, _torch_dtype(dtype))
    if tokenizer is not None:
        match_token_ids(model.config, tokenizer, name)
    loaded: nn.Module = model if adapter is None else _with_adapter(model, str(adapter))
    return loaded.eval() if device is None else loaded.to(device).eval()


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer and make sure that it knows its mask token.

    An adapter folder without tokenizer files lends that of its base model.

    Raises:
        CheckpointError: There is no readable tokenizer.
        DataError: The tokenizer has no mask token.
    """
    name = str(name_or_path)
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("tokenizer*")):
        name = _base_of_adapter(folder)
    _check_exists(name)
    with _readable(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.mask_token_id is None:
        known = [token for token in KNOWN_MASK_TOKENS if token in tokenizer.get_vocab()]
        if not known:
            raise DataError(
                f'the tokenizer of {name} has no mask token: set "mask_token" in its '
                "tokenizer_config.json to the token that stands for a hidden one"
            )
        tokenizer.mask_token = known[0]
    return tokenizer


def match_token_ids(
    config: PreTrainedConfig, tokenizer: "PreTrainedTokenizerBase", name: str = "the model"
) -> None:
    """Give `config` the mask, padding and end-of-text ids it lacks, and refuse ids that differ.

    A default beyond the vocabulary counts as lacking: it belongs to the published sizes.

    Raises:
        CheckpointError: Model and tokenizer disagree about an id or the size of the vocabulary.
    """
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{name} has {config.vocab_size:,} token embeddings but the tokenizer "
            f"{len(tokenizer):,} tokens: use the tokenizer that belongs to the model"
        )
    for field in _TOKEN_IDS:
        ours, theirs = getattr(config, field), getattr(tokenizer, field)
        known = [i for i in (ours if isinstance(ours, list) else [ours]) if i is not None]
        known = [i for i in known if i < config.vocab_size]
        if theirs is None:
            continue
        if not known:
            setattr(config, field, theirs)
        elif theirs not in known:
            raise CheckpointError(
                f"{name}: config.json says {field} {ours}, the tokenizer says {theirs}: use the "
                f"tokenizer that belongs to the model, or correct {field} in config.json"
            )


def supported_architectures() -> tuple[str, ...]:
    """Return the names in `architectures` of config.json that can be loaded."""
    return tuple(sorted(cls.__name__ for cls in DiffusionMaskedLM.__subclasses__()))


def _load_base(name: str, dtype: torch.dtype | str) -> DiffusionMaskedLM:
    _check_exists(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise CheckpointError(f"{name} holds no config.json: name the folder of a saved model")
    with _readable(name, "model"):
        fields, _ = PreTrainedConfig.get_config_dict(name)
    supported = supported_architectures()
    named = fields.get("architectures") or []
    if not set(named) & set(supported):
        shown = ", ".join(named) or f"nothing (model_type {fields.get('model_type')!r})"
        raise CheckpointError(
            f"{name}: config.json names the architecture {shown}; supported are "
            f"{', '.join(supported)}"
        )
    with _readable(name, "model"):
        model, report = AutoModelForMaskedLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            # Reported below with the other misfits, in one line.
            ignore_mismatched_sizes=True,
        )
    misfits = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "of another size": sorted(str(key[0]) for key in report["mismatched_keys"]),
    }
    found = "; ".join(f"{kind}: {_shorten(keys)}" for kind, keys in misfits.items() if keys)
    if found:
        raise CheckpointError(
            f"{name}: the weights do not fit {type(model).__name__} ({found}): the files are "
            "incomplete or belong to another config.json; download or save them again"
        )
    return model


def _with_adapter(model: DiffusionMaskedLM, adapter: str) -> nn.Module:
    from peft import PeftModel
    from peft.utils import load_peft_weights

    _check_exists(adapter)
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{adapter} holds no adapter_config.json: name the folder of a PEFT adapter"
        )
    with _readable(adapter, "adapter"), warnings.catch_warnings():
        # PEFT would go on with adapter weights left at their random start.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted = PeftModel.from_pretrained(model, adapter)
        # Nor does it mind weights for layers that the model has under another name, or fused.
        given = sum("lora_" in name for name in load_peft_weights(adapter, device="cpu"))
        placed = sum("lora_" in name for name in adapted.state_dict())
    if given > placed:
        raise CheckpointError(
            f"{adapter}: {given - placed} of its {given} LoRA weights have no place in "
            f"{type(model).__name__}; use an adapter trained with memdlm"
        )
    return adapted


def _base_of_adapter(folder: Path) -> str:
    """Return the base model an adapter names; a path that starts with a dot counts from there."""
    from peft import PeftConfig

    with _readable(str(folder), "adapter"):
        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"{folder}: adapter_config.json names no base model: give the model, and this "
            "folder as its adapter"
        )
    return str((folder / base).resolve()) if base.startswith(".") else str(base)


def _check_exists(name: str) -> None:
    """Refuse what looks like a path and is no folder, before it is looked up on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return
    if path.exists():
        raise CheckpointError(f"{name} is a file: name the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise CheckpointError(f"no model folder at {name or '(an empty path)'}: check the path")


@contextmanager
def _readable(name: str, what: str) -> Iterator[None]:
    """Turn whatever reading a checkpoint raises into one line; our own errors pass."""
    try:
        yield
    except _READING_ERRORS as error:
        where = "folder" if Path(name).is_dir() else "local folder or reachable hub model"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"cannot load the {what} from {name} ({reason[:300]}): check that it is a complete "
            f"{where}"
        ) from error


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None or isinstance(dtype, torch.dtype):
        return "auto" if dtype is None else dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    return dtype


def _shorten(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    accelerator: Any = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator
