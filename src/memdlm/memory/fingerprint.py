"""Identity of a base and of its outer adapter: which network a memory was written on.

A fingerprint is a SHA-256 over the architecture, the config fields that change what the network
computes, and of every weight its name, its shape and up to 16,384 evenly spaced values. Values are
compared as float32, so a checkpoint loaded in a wider type stays the same base. One that was
rounded (float32 to bfloat16, or to 4 bits) is another: the memory's gradients were taken elsewhere.
Reading a sample keeps it cheap at any size; what it cannot see is a change of a few single values
of a large matrix, which no training and no conversion makes.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch

from memdlm.backbones.base import DiffusionMaskedLM

SAMPLED_VALUES = 16_384
_SCHEME = "memdlm-fingerprint-1"

# Fields of our config classes that change how a network is called, drawn or trained, not what it
# computes.
_CALLING = (
    "mask_token_id",
    "pad_token_id",
    "eos_token_id",
    "max_position_embeddings",
    "max_sequence_length",
    "initializer_range",
    "init_std",
    "attention_dropout",
    "attention",
    "block_length",
)


def base_fingerprint(lm: DiffusionMaskedLM) -> str:
    """Return the identity of the backbone without its outer adapter, in hex."""
    weights = {
        _plain(name): tensor for name, tensor in lm.state_dict().items() if not is_adapter(name)
    }
    return _hash([type(lm).__name__, _config(lm.config)], weights)


def adapter_fingerprint(lm: DiffusionMaskedLM) -> str | None:
    """Return the identity of the outer adapter inside `lm`, in hex; None if there is none."""
    weights = {_plain(name): tensor for name, tensor in lm.state_dict().items() if is_adapter(name)}
    if not weights:
        return None
    scales = {
        name: {key: float(value) for key, value in scaling.items()}
        for name, module in lm.named_modules()
        if isinstance(scaling := getattr(module, "scaling", None), dict)
    }
    return _hash([scales], weights)


def is_adapter(name: str) -> bool:
    """Tell whether a weight of this name belongs to an adapter around the base."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def _plain(name: str) -> str:
    """Return the name a base weight has without wrappers of an adapter."""
    parts = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
    return ".".join(parts)


def _config(config: Any) -> dict[str, Any]:
    """Return the fields of our own config class that differ from its defaults.

    Fields that a newer library or class adds then leave old fingerprints as they are.
    """
    declared = type(config)
    names = [name for name in declared.__annotations__ if name not in _CALLING]
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(declared, name, None)}


def _hash(facts: list[Any], weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([_SCHEME, *facts], sort_keys=True, default=str).encode())
    names = sorted(weights)
    for name in names:
        digest.update(json.dumps([name, list(weights[name].shape)]).encode())
    for values in _samples(weights[name] for name in names):
        digest.update(values)
    return digest.hexdigest()


@torch.no_grad()
def _samples(tensors: Iterable[torch.Tensor]) -> Iterable[bytes]:
    """Yield the sampled values of every tensor."""
    for tensor in tensors:
        values = tensor.detach().reshape(-1)
        if values.numel() > SAMPLED_VALUES:
            places = torch.arange(SAMPLED_VALUES, device=values.device)
            values = values[places * values.numel() // SAMPLED_VALUES]
        if values.is_floating_point():
            yield values.float().cpu().numpy().astype("<f4").tobytes()
        else:
            yield values.cpu().numpy().tobytes()
