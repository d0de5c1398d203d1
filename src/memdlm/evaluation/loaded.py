"""An arm's model and tokenizer, and what identifies them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from memdlm.backbones.adapters import base_of_adapter
from memdlm.backbones.loading import default_device, load_model
from memdlm.backbones.reading import check_exists
from memdlm.backbones.tokenizers import load_tokenizer
from memdlm.backbones.wrapping import unwrap
from memdlm.errors import UsageError
from memdlm.evaluation.config import Arm
from memdlm.evaluation.prepared import tokenizer_hash
from memdlm.memory.fingerprint import adapter_fingerprint, base_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model that several arms may share.

    Attributes:
        model: On the accelerator if there is one, in evaluation mode.
        tokenizer: The model's.
        identity: Fingerprints and types, as results record them.
    """

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    identity: dict[str, Any]

    @property
    def context_length(self) -> int:
        """Most tokens of an input."""
        config: Any = unwrap(self.model).config
        context: int = config.max_position_embeddings
        return context


def arm_tokenizer(arm: Arm) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of an arm's model; its adapter's where that brings one.

    Raises:
        UsageError: The arm has no model.
        CheckpointError: There is no readable tokenizer.
    """
    if arm.model is None:
        raise UsageError(f"arm {arm.name} has no model: name one with --arm {arm.name}=MODEL")
    has_own = arm.adapter is not None and any(Path(arm.adapter).glob("tokenizer*"))
    return load_tokenizer(arm.adapter if has_own and arm.adapter else arm.model)


def base_of(model: str) -> str:
    """Return whose config.json describes a model: its own name, or the base of an adapter folder.

    Raises:
        CheckpointError: There is no such folder, or an adapter that names no base.
    """
    check_exists(model)
    path = Path(model).expanduser()
    is_adapter = (path / "adapter_config.json").is_file()
    return str(base_of_adapter(path)) if is_adapter else model


def load_arm(arm: Arm) -> LoadedModel:
    """Load what an arm names.

    Raises:
        UsageError: The arm has no model.
        ConfigError: Its type or quantization is unknown.
        CheckpointError: It cannot be read.
    """
    tokenizer = arm_tokenizer(arm)
    model = load_model(
        str(arm.model),
        dtype=arm.dtype,
        adapter=arm.adapter,
        device=default_device(),
        tokenizer=tokenizer,
        quantization=arm.quantization,
    )
    backbone = unwrap(model)
    identity = {
        "model_fingerprint": base_fingerprint(backbone),
        "adapter_fingerprint": adapter_fingerprint(backbone),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "quantization": arm.quantization,
    }
    return LoadedModel(model, tokenizer, identity)


def by_model(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Return the arms in groups that share a model, which is then loaded once."""
    groups: dict[Any, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.source, []).append(arm)
    return list(groups.values())


def check_arms(arms: Sequence[Arm]) -> None:
    """Refuse no arms, and two of one name.

    Raises:
        UsageError: One of the two.
    """
    if not arms:
        raise UsageError("there is no model: name one with --arm NAME=MODEL[,ADAPTER]")
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two arms are called {twice}: name every arm once")


def memory_settings(arm: Arm) -> dict[str, Any]:
    """Return what of an arm's memory decides its numbers."""
    if not arm.memory.enabled:
        return {"memory": {"enabled": False}}
    return {"memory": asdict(arm.memory), "objective": asdict(arm.objective)}
