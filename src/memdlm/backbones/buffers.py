"""Numbers that no file holds: rotary frequencies, verified after loading and kept in fp32.

They are derived from the config while a model is built. A load that builds on the meta device must
fill them afterwards, and a cast to half precision would round them: both go unnoticed, the model
only answers worse the longer the text. Source of the frequencies: RoPE (arXiv 2104.09864), as the
official code computes them, in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memdlm.errors import CheckpointError

_HALF = (torch.bfloat16, torch.float16)


def check_buffers(model: Any, name: str) -> None:
    """Compare every buffer that no file holds with what the config gives, bit for bit.

    Args:
        model: A `DiffusionMaskedLM`, freshly loaded.
        name: What it was loaded from, for the message.

    Raises:
        CheckpointError: One differs, or there is one of which this file knows nothing.
    """
    rotary = model.model.rotary_emb
    frequencies = rotary_frequencies(model.config)
    expected = {
        "model.rotary_emb.inv_freq": frequencies,
        "model.rotary_emb.original_inv_freq": frequencies,
    }
    wrong = []
    for prefix, module in model.named_modules():
        for buffer in module._non_persistent_buffers_set:
            key = f"{prefix}.{buffer}"
            if key not in expected or not _same(getattr(module, buffer), expected[key]):
                wrong.append(key)
    if rotary.attention_scaling != 1.0:
        wrong.append("model.rotary_emb.attention_scaling")
    if wrong:
        raise CheckpointError(
            f"{name}: {', '.join(sorted(wrong))} of the loaded model is not what config.json "
            "gives: install a supported version of transformers (see `memdlm env`) and report it"
        )


def rotary_frequencies(config: Any) -> torch.Tensor:
    """Return theta^(-2i/d) for the d rotary dimensions of a head, [d / 2] float32."""
    rope = config.rope_parameters
    dims = int(config.head_dim * rope["partial_rotary_factor"])
    exponents = torch.arange(0, dims, 2, dtype=torch.int64, device="cpu").float() / dims
    return 1.0 / (rope["rope_theta"] ** exponents)


def keep_float32_buffers(model: nn.Module, apply: Callable[[], object]) -> None:
    """Run `apply`, which moves or casts `model`, and undo casts of fp32 buffers to half precision.

    Rotary frequencies stay as the official code has them, and so does the bias by which LLaDA2.x
    picks experts.
    """
    before = {
        (module, name): tensor
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None and tensor.dtype == torch.float32
    }
    apply()
    for (module, name), tensor in before.items():
        after = module._buffers.get(name)
        if after is not None and after.dtype in _HALF:
            module._buffers[name] = tensor.to(after.device)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape or found.is_meta:
        return False
    if found.device.type == "cpu":
        return torch.equal(found, expected)
    # An accelerator's power function may differ in the last bit.
    return torch.allclose(found.cpu(), expected, rtol=1e-6, atol=0.0)
