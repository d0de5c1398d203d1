"""What `model_args` says in words, turned into models and settings."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from memdlm.errors import ConfigError, UsageError
from memdlm.memory.config import MemoryConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_ON, _OFF = (True, "on", "true", "True", 1), (None, False, "off", "false", "False", 0)


def memory_setting(given: "MemoryConfig | str | bool | None") -> MemoryConfig:
    """Return the settings that `memory=on`, `memory=off` or settings mean.

    Raises:
        UsageError: It is none of these.
    """
    if isinstance(given, MemoryConfig):
        return given
    if given in _ON:
        return MemoryConfig()
    if given in _OFF:
        return MemoryConfig(enabled=False)
    raise UsageError(f"memory={given}: use on or off, and memory.KEY=VALUE for its settings")


def with_assignments(configs: Mapping[str, Any], assignments: Mapping[str, Any]) -> dict[str, Any]:
    """Return dataclasses by name after changes such as `sampling.block_length`: 32.

    Raises:
        UsageError: A name is unknown, or a value is out of range.
    """
    changes: dict[str, dict[str, Any]] = {name: {} for name in configs}
    for key, value in assignments.items():
        section, _, name = key.partition(".")
        known = [f.name for f in fields(configs[section])] if section in configs else []
        if name not in known:
            every = [f"{s}.{f.name}" for s, config in configs.items() for f in fields(config)]
            close = difflib.get_close_matches(key, every, n=1)
            hint = f"did you mean {close[0]}?" if close else f"sections are {', '.join(configs)}"
            raise UsageError(f"model_args: there is no argument {key}; {hint}")
        changes[section][name] = value
    try:
        return {name: replace(config, **changes[name]) for name, config in configs.items()}
    except (ConfigError, TypeError) as error:
        raise UsageError(f"model_args: {error}") from error


def load(
    name: str,
    *,
    adapter: str | None,
    dtype: str,
    quantization: str | None,
    attention: str | None,
    device: str | None,
) -> "tuple[nn.Module, PreTrainedTokenizerBase]":
    """Load a model and its tokenizer by name.

    Raises:
        CheckpointError, ConfigError, DataError: As `load_model` and `load_tokenizer`.
    """
    from pathlib import Path

    from memdlm.backbones.loading import default_device, load_model
    from memdlm.backbones.tokenizers import load_tokenizer

    has_tokenizer = adapter is not None and any(Path(adapter).glob("tokenizer*"))
    tokenizer = load_tokenizer(adapter if adapter is not None and has_tokenizer else name)
    model = load_model(
        name,
        dtype=dtype,
        adapter=adapter,
        device=default_device() if device is None else device,
        tokenizer=tokenizer,
        attention=attention,
        quantization=quantization,
    )
    return model, tokenizer


def fingerprint(model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the identity of a model with its adapter, type of weights and tokenizer, in hex."""
    from memdlm.backbones.wrapping import unwrap
    from memdlm.memory.fingerprint import adapter_fingerprint, base_fingerprint

    backbone = unwrap(model)
    facts = {
        "base": base_fingerprint(backbone),
        "adapter": adapter_fingerprint(backbone),
        "dtype": str(next(model.parameters()).dtype),
        "attention": getattr(backbone.config, "attention", None),
        "vocabulary": tokenizer.get_vocab(),
    }
    return settings_hash(facts)


def settings_hash(settings: Mapping[str, Any] | str) -> str:
    """Return the SHA-256 of settings, in hex; JSON where they are no text."""
    text = settings if isinstance(settings, str) else json.dumps(dict(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
