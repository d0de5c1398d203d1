"""The one place that leans on transformers' young interfaces for configs and checkpoint keys.

Registers our families with the Auto classes and teaches `from_pretrained` and `save_pretrained` the
official key names, so that official checkpoints go in and come out unchanged.
"""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from memdlm.errors import CheckpointError


def register_family(
    config_class: type[PreTrainedConfig],
    model_class: type[PreTrainedModel],
    layout: Sequence[WeightConverter | WeightRenaming],
) -> None:
    """Make the Auto classes build `model_class`, reading and writing its official key names."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForMaskedLM.register(config_class, model_class, exist_ok=True)
    register_checkpoint_conversion_mapping(config_class.model_type, list(layout), overwrite=True)


def renames(table: dict[str, str]) -> list[WeightRenaming]:
    """Return renamings from official to native key patterns, in order."""
    return [WeightRenaming(official, native) for official, native in table.items()]


def fused_experts() -> list[WeightConverter]:
    """Return the converters between one matrix per expert (official) and stacked ones (native)."""
    return [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def apply_attribute_map(config: PreTrainedConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """Set fields given by their transformers name and return what is left of `extra`.

    transformers applies `attribute_map` only after `__post_init__` has derived other fields.
    """
    for name in list(extra):
        if name in config.attribute_map:
            setattr(config, config.attribute_map[name], extra.pop(name))
    # A stale pointer to remote code would make every reader of the saved folder ask for trust.
    extra.pop("auto_map", None)
    return extra


def refuse(config: PreTrainedConfig, supported: dict[str, tuple[Any, ...]]) -> None:
    """Refuse config values that the native model does not implement.

    Raises:
        CheckpointError: Naming the field, its value and what is supported.
    """
    for name, allowed in supported.items():
        value = getattr(config, name, None)
        if value not in allowed:
            raise CheckpointError(
                f"{config.model_type} config: {name}={value!r} is not supported (only "
                f"{' or '.join(map(repr, allowed))}); no published checkpoint is known to use it"
            )


def set_rotary(config: PreTrainedConfig, theta: float, partial_factor: float | None = None) -> None:
    """Give transformers' rotary layers the settings that official configs keep under other names.

    Called after `PreTrainedConfig.__post_init__`, which would otherwise rewrite them.
    """
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": theta,
        "partial_rotary_factor": 1.0 if partial_factor is None else partial_factor,
    }


def official_dict(fields: dict[str, Any]) -> dict[str, Any]:
    """Drop what only transformers' layers read from a config about to be saved."""
    return {name: value for name, value in fields.items() if name != "rope_parameters"}
