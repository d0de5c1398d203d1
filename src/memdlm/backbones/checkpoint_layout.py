"""The one place that leans on transformers' young interfaces for configs and checkpoint keys.

Registers our families with the Auto classes and teaches `from_pretrained` and `save_pretrained` the
official key names, so that official checkpoints go in and come out unchanged.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
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


def register_renamed(model_type: str, config_class: type[PreTrainedConfig]) -> None:
    """Let a config.json that calls a family `model_type` load; saving writes the official name."""

    def from_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        fields = {**config_dict, "model_type": config_class.model_type}
        return config_class.from_dict(fields, **kwargs)

    name = f"{config_class.__name__}As_{model_type}"
    body = {"model_type": model_type, "from_dict": classmethod(from_dict)}
    AutoConfig.register(model_type, type(name, (config_class,), body), exist_ok=True)


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


def official_names(model_type: str, names: Iterable[str]) -> dict[str, str]:
    """Return the official name of every native module name, by a family's renamings run backwards.

    Stacked experts keep their path, below which the official code has one module per expert.
    """
    table = get_checkpoint_conversion_mapping(model_type) or []
    backwards = [
        cast(WeightRenaming, entry.reverse_transform())
        for entry in reversed(table)
        if isinstance(entry, WeightRenaming)
    ]
    # The patterns are those of weights, which end one part later than their modules.
    return {
        name: apply_renamings(f"{name}.weight", backwards).removesuffix(".weight") for name in names
    }
