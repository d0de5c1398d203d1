"""Outer adapters: LoRA put on a backbone, new or from a file, every weight in its place.

The light face of `memdlm.backbones.adapters.model`, whose import takes seconds.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.reading import check_exists, readable
from memdlm.errors import CheckpointError, ConfigError, UsageError

if TYPE_CHECKING:
    from peft import PeftModel

    from memdlm.backbones.adapters.model import AdaptedModel


def add_lora(model: nn.Module, config: Any, adapter_name: str = "default") -> "AdaptedModel":
    """Put a new LoRA on `model`, in place; the base weights are frozen.

    Unlike `peft.get_peft_model`, it also reaches the routed experts: `all-linear` is every linear
    layer of the official code but the head. The result saves and loads adapters in the layout in
    which they are published.

    Args:
        model: A memdlm backbone.
        config: A `peft.LoraConfig`; `target_modules` takes official names and ours, and names of
            modules around linear layers, e.g. `experts`. It is copied.
        adapter_name: Name of the adapter.

    Raises:
        ConfigError: The config asks for something not supported, or its targets match nothing.
        UsageError: `model` is no backbone, or carries an adapter already.
    """
    from memdlm.backbones.adapters.model import AdaptedModel

    if not isinstance(model, DiffusionMaskedLM):
        raise UsageError(
            f"a {type(model).__name__} takes no new adapter: give the memdlm backbone itself, or "
            "call add_adapter on a model that carries one"
        )
    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers renamed.
        warnings.filterwarnings("ignore", category=FutureWarning)
        return AdaptedModel(model, config, adapter_name)


def with_adapter(model: DiffusionMaskedLM, adapter: str | Path) -> "PeftModel":
    """Put the adapter in folder or hub name `adapter` on `model`, frozen.

    One with PEFT's `target_parameters`, as an exported memory is (`memdlm.memory.export`), stays a
    plain `PeftModel`.

    Raises:
        CheckpointError: It is missing, damaged, incomplete, a pickle, made for another model, or
            uses something not supported.
    """
    from peft import PeftConfig, PeftModel

    from memdlm.backbones.adapters.model import AdaptedModel

    adapter = str(adapter)
    check_exists(adapter)
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{adapter} holds no adapter_config.json: name the folder of a PEFT adapter"
        )
    with readable(adapter, "adapter"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        config = PeftConfig.from_pretrained(adapter)
        if getattr(config, "target_parameters", None):
            # PEFT would go on with adapter weights left at their random start.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, adapter, config=config)
        try:
            return AdaptedModel.from_pretrained(model, adapter)
        except ConfigError as error:
            raise CheckpointError(f"{adapter}: {error}") from error


def base_of_adapter(folder: Path) -> str:
    """Return the base model an adapter names; a path that starts with a dot counts from there."""
    from peft import PeftConfig

    with readable(str(folder), "adapter"):
        base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"{folder}: adapter_config.json names no base model: give the model, and this "
            "folder as its adapter"
        )
    return str((folder / base).resolve()) if base.startswith(".") else str(base)
