"""Load models, turning everything that can go wrong into one line.

Reads the official layout through `AutoModelForMaskedLM`; nothing in a checkpoint is executed. Every
weight must find its place: a partly loaded model trains and answers, only badly.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from memdlm.backbones.adapters import base_of_adapter, with_adapter
from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.buffers import check_buffers
from memdlm.backbones.quantization import (
    QuantizationConfig,
    as_quantization,
    check_dtype,
    loading_arguments,
)
from memdlm.backbones.reading import check_exists, read_config, readable
from memdlm.backbones.tokenizers import match_token_ids
from memdlm.backbones.weight_files import check_weight_files
from memdlm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    attention: str | None = None,
    quantization: QuantizationConfig | str | None = None,
) -> nn.Module:
    """Load a checkpoint of a supported family, in evaluation mode.

    Args:
        name_or_path: Folder or hub name in the official layout; or a PEFT adapter folder, which
            brings its base model with it (a relative base path counts from that folder).
        dtype: Weights' type, one of `DTYPES` or a torch dtype; None and "auto" keep the file's.
        adapter: PEFT adapter folder or hub name to put on the model.
        device: Where the model goes; None leaves it on the CPU.
        tokenizer: Supplies special token ids that the config lacks (see `match_token_ids`).
        attention: "full" or "block_causal", for families that know both (LLaDA2.x); None keeps
            what the config says, which is "full" for published files.
        quantization: "nf4", or its settings, for a frozen base in 4 bits with all else in bfloat16;
            a log line tells what was quantised and what not.

    Raises:
        CheckpointError: The folder is missing or damaged, the hub cannot be reached, the
            architecture is not supported, a weight is missing or left over, or ids disagree.
        ConfigError: `attention` is not one of the family's; `dtype` is unknown or excludes
            `quantization`, which may be unknown too or lack bitsandbytes.
    """
    quantization = as_quantization(quantization)
    check_dtype(quantization, "auto" if dtype is None else dtype)
    name = str(name_or_path)
    if adapter is None and (Path(name) / "adapter_config.json").is_file():
        name, adapter = base_of_adapter(Path(name)), name
    model = _load_base(name, _torch_dtype(dtype), quantization, device)
    if attention is not None:
        _declare_attention(model, attention)
    if tokenizer is not None:
        match_token_ids(model.config, tokenizer, name)
    loaded: nn.Module = model if adapter is None else with_adapter(model, str(adapter))
    return loaded.eval() if device is None else loaded.to(device).eval()


def supported_architectures() -> tuple[str, ...]:
    """Return the names in `architectures` of config.json that can be loaded."""
    return tuple(sorted(cls.__name__ for cls in DiffusionMaskedLM.__subclasses__()))


def check_architecture(name: str) -> None:
    """Refuse a folder or hub name whose config.json is missing or names no supported architecture.

    Raises:
        CheckpointError: One of the two, or the hub cannot be reached.
    """
    check_exists(name)
    fields = read_config(name)
    supported = supported_architectures()
    named = fields.get("architectures") or []
    if not set(named) & set(supported):
        shown = ", ".join(named) or f"nothing (model_type {fields.get('model_type')!r})"
        raise CheckpointError(
            f"{name}: config.json names the architecture {shown}; supported are "
            f"{', '.join(supported)}"
        )
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{name}: config.json says that its weights are quantised already: use the original "
            "checkpoint, and quantization nf4 to load it in 4 bits"
        )


def _load_base(
    name: str,
    dtype: torch.dtype | str,
    quantization: QuantizationConfig,
    device: torch.device | str | None,
) -> DiffusionMaskedLM:
    check_architecture(name)
    if Path(name).is_dir():
        check_weight_files(Path(name))
    arguments = loading_arguments(quantization, "cpu" if device is None else device)
    with readable(name, "model"):
        model, report = AutoModelForMaskedLM.from_pretrained(
            name,
            **{"dtype": dtype, **arguments},
            trust_remote_code=False,
            use_safetensors=True,
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
    check_buffers(model, name)
    return model


def _declare_attention(model: DiffusionMaskedLM, attention: str) -> None:
    known = model.attentions
    if attention not in known:
        raise ConfigError(
            f"attention: {attention!r} is not what {type(model).__name__} offers "
            f"({', '.join(known)}); leave it out, or use another model"
        )
    if hasattr(model.config, "attention"):
        model.config.attention = attention


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype):
        is_known = dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    else:
        is_known = dtype in DTYPES
    if not is_known:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    return dtype


def _shorten(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def default_device() -> torch.device:
    """Return this process's accelerator if there is one, else the CPU.

    Where a launcher such as torchrun gives the processes of a machine a number each (LOCAL_RANK),
    they take the accelerators in turn.
    """
    accelerator: Any = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK", "")
    if not local.isdigit():
        return torch.device(accelerator)
    return torch.device(accelerator.type, int(local) % torch.accelerator.device_count())
