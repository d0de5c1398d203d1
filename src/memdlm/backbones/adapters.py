"""Outer adapters: PEFT adapters put on a backbone, every weight in its place."""

import warnings
from pathlib import Path

from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.reading import check_exists, readable
from memdlm.errors import CheckpointError


def with_adapter(model: DiffusionMaskedLM, adapter: str) -> nn.Module:
    """Put the adapter in folder or hub name `adapter` on `model`.

    Raises:
        CheckpointError: It is missing, damaged, incomplete, or made for another model.
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights

    check_exists(adapter)
    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{adapter} holds no adapter_config.json: name the folder of a PEFT adapter"
        )
    with readable(adapter, "adapter"), warnings.catch_warnings():
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
