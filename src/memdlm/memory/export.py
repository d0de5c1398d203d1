"""A memory as a LoRA adapter that PEFT reads: the same logits, without memdlm's fast weights.

Two layouts, equal for the numbers:

    peft        for `PeftModel.from_pretrained` and `load_model(adapter=...)` on our models: native
                names, one fused pair of factors per stack of experts (PEFT's target_parameters)
    published   for `load_model(adapter=...)`, and for PEFT on the official code: official names,
                one pair of factors per expert, as adapters of these checkpoints are published

In the fused layout A [E, r, in] becomes [E * r, in] and B [E, out, r] becomes [out, r * E], experts
innermost; gate and up share one matrix, so they get rank 2r with a block-diagonal B. The whole
adapter then has rank 2r and alpha doubled, the other factors being padded with zeros: PEFT warns of
ranks of their own for parameters. PEFT adds B A to the base weights at every forward, which costs
time and memory that fast weights do not, and does not work on 4-bit experts; the published layout
does.

What was never written has factors of zero; a stack of which nothing was written is left out.
"""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn import functional as F

from memdlm.backbones.checkpoint_layout import official_names
from memdlm.errors import ConfigError, UsageError
from memdlm.memory.artefact import Artefact
from memdlm.memory.new_folder import new_folder
from memdlm.memory.placement import Site
from memdlm.memory.sparse import SiteDelta, site_delta

LAYOUTS = ("peft", "published")

Tensors = dict[str, torch.Tensor]

# The fused weight of each projection; gate lies above up.
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_HALVES = ("gate_proj", "up_proj")


def export_adapter(
    artefact: Artefact, folder: str | Path, *, row: int = 0, layout: str = "peft"
) -> None:
    """Write one memory as an adapter into a new `folder`.

    It holds the memory alone: where the memory was written beside an outer adapter, the exported
    one must be loaded beside that adapter too, or on a base it was merged into.

    Args:
        artefact: A memory.
        folder: Must not exist.
        row: Which of its memories.
        layout: One of `LAYOUTS`.

    Raises:
        CheckpointError: `folder` exists or cannot be written; nothing is left behind.
        ConfigError: `layout` is unknown.
        UsageError: The memory is no LoRA, has no such row, or nothing was written in it.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout: {layout!r} is not one of {', '.join(LAYOUTS)}")
    if artefact.config.kind != "lora":
        raise UsageError(
            "a memory of full deltas (memory.kind: full) is no LoRA and cannot be exported as one; "
            "write it with memory.kind: lora"
        )
    if not 0 <= row < len(artefact.rows):
        raise UsageError(f"row {row}: the memory has {len(artefact.rows)} rows, counted from 0")
    deltas = [site_delta(artefact.tensors, row, site) for site in artefact.sites]
    written = [delta for delta in deltas if delta is not None]
    if not written:
        raise UsageError("nothing was written in this memory, so there is nothing to export")
    with new_folder(Path(folder), "adapter") as staging:
        build = {"peft": _peft_layout, "published": _published_layout}[layout]
        tensors, settings = build(written, artefact)
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            staging / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        _lora_config(artefact, settings).save_pretrained(str(staging))


def _lora_config(artefact: Artefact, settings: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        lora_dropout=0.0,
        inference_mode=True,
        base_model_name_or_path=artefact.base.name or None,
        **settings,
    )


def _published_layout(
    deltas: list[SiteDelta], artefact: Artefact
) -> tuple[Tensors, dict[str, Any]]:
    """Return tensors under official names, and which modules they adapt."""
    modules = [f"model.{_module(delta.site)}" for delta in deltas]
    official = official_names(artefact.base.model_type, modules)
    tensors: Tensors = {}
    targets = []
    for delta, module in zip(deltas, modules, strict=True):
        if delta.experts is None:
            paths = [official[module]]
            factors = [(delta.tensors["A"], delta.tensors["B"])]
        else:
            a, b = _all_experts(delta)
            factors = list(zip(a, b, strict=True))
            paths = [f"{official[module]}.{e}.{delta.site.projection}" for e in range(len(a))]
        for path, (a_matrix, b_matrix) in zip(paths, factors, strict=True):
            tensors[f"base_model.model.{path}.lora_A.weight"] = a_matrix
            tensors[f"base_model.model.{path}.lora_B.weight"] = b_matrix
        targets += paths
    alpha = _whole(artefact.config.alpha)
    return tensors, {
        "r": artefact.config.rank,
        "lora_alpha": alpha,
        "target_modules": targets,
    }


def _peft_layout(deltas: list[SiteDelta], artefact: Artefact) -> tuple[Tensors, dict[str, Any]]:
    """Return tensors under the names of PEFT's wrappers around our modules, and their targets."""
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    linear: list[str] = []
    parameters: list[str] = []
    stacks: dict[str, dict[str, SiteDelta]] = {}
    for delta in deltas:
        module = f"model.{_module(delta.site)}"
        if delta.experts is None:
            linear.append(module)
            factors[module] = (delta.tensors["A"], delta.tensors["B"])
        else:
            projection = delta.site.name.rsplit(".", 1)[1]
            stacks.setdefault(module, {})[projection] = delta
    for module, projections in stacks.items():
        fused = list(dict.fromkeys(_FUSED[name] for name in _FUSED if name in projections))
        # PEFT wraps one parameter after the other: the first ends up inside.
        for depth, name in enumerate(reversed(fused)):
            is_double = name == "gate_up_proj"
            pair = _gate_up(projections) if is_double else _all_experts(projections[name])
            factors[module + ".base_layer" * depth] = pair
            parameters.append(f"{module}.{name}")
    rank, alpha = artefact.config.rank, artefact.config.alpha
    is_doubled = any(name.endswith(".gate_up_proj") for name in parameters)
    if is_doubled:
        rank, alpha = 2 * rank, 2 * alpha
    tensors: Tensors = {}
    for name, (a, b) in factors.items():
        a = F.pad(a, (0, 0, 0, rank - a.shape[-2]))
        b = F.pad(b, (0, rank - b.shape[-1]))
        if a.dim() == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    settings: dict[str, Any] = {"r": rank, "lora_alpha": _whole(alpha), "target_modules": linear}
    if parameters:
        settings["target_parameters"] = sorted(parameters)
    return tensors, settings


def _whole(alpha: float) -> Any:
    """Return alpha as PEFT writes it: an int, wherever it is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _module(site: Site) -> str:
    """Return the path of the module below the backbone, as if no adapter were around."""
    return site.name if site.projection is None else site.name.rsplit(".", 1)[0]


def _all_experts(delta: SiteDelta) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [E, r, in] and B [E, out, r] with zeros for the experts that were not written."""
    assert delta.experts is not None and delta.site.num_experts is not None
    whole = []
    for part in ("A", "B"):
        tensor = delta.tensors[part]
        full = tensor.new_zeros(delta.site.num_experts, *tensor.shape[1:])
        full[list(delta.experts)] = tensor
        whole.append(full)
    return whole[0], whole[1]


def _gate_up(projections: dict[str, SiteDelta]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [E, 2r, in] and block-diagonal B [E, 2 out, 2r] of the fused gate and up."""
    parts = {name: _all_experts(projections[name]) for name in _HALVES if name in projections}
    a, b = next(iter(parts.values()))
    blank = torch.zeros_like(a), torch.zeros_like(b)
    halves = [parts.get(name, blank) for name in _HALVES]
    fused_a = torch.cat([half[0] for half in halves], dim=1)
    zero = torch.zeros_like(b)
    upper = torch.cat([halves[0][1], zero], dim=2)
    lower = torch.cat([zero, halves[1][1]], dim=2)
    return fused_a, torch.cat([upper, lower], dim=1)
