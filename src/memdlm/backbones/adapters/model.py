"""`AdaptedModel`: a PEFT model whose LoRA reaches routed experts and speaks official names on disk.

In memory a plain `PeftModel` with our module names; `target_modules`, as given by users and files,
may use either naming and is resolved to exact paths before PEFT sees it. Importing this file
imports PEFT, which takes seconds: import it inside functions, or go through
`memdlm.backbones.adapters`.
"""

import copy
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, PeftConfig, PeftModel, PeftType
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import save_file
from torch import nn

from memdlm.backbones.adapters.expert_lora import INITIALISATIONS, ExpertLora
from memdlm.backbones.adapters.files import (
    WEIGHTS,
    check_complete,
    place_factors,
    read_tensors,
    to_file,
    to_native,
)
from memdlm.backbones.adapters.places import Place, PlaceTable, find_places
from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.experts import Experts
from memdlm.backbones.quantization import is_quantized
from memdlm.errors import CheckpointError, ConfigError

# Fields of LoraConfig that are honoured, or that change nothing by themselves; all others must be
# at their defaults.
_HONOURED = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}


class AdaptedModel(PeftModel):
    """A backbone with LoRA adapters on any of its linear layers, routed experts included.

    Saved adapters are read by plain PEFT on the official code's model, and the other way round.
    """

    def __init__(
        self,
        model: DiffusionMaskedLM,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        """Put a new adapter on `model`, in place; arguments as for `PeftModel`.

        Raises:
            ConfigError: The config asks for something not supported, or its targets match nothing.
        """
        table = find_places(model)
        super().__init__(model, resolve(peft_config, table), adapter_name, **kwargs)
        self._places = table

    @property
    def _backbone(self) -> DiffusionMaskedLM:
        return cast(DiffusionMaskedLM, self.get_base_model())

    @property
    def _tuner(self) -> LoraModel:
        return cast(LoraModel, self.base_model)

    def add_adapter(  # type: ignore[override]
        self, adapter_name: str, peft_config: PeftConfig, **kwargs: Any
    ) -> None:
        """Put one more adapter on the model; see `PeftModel.add_adapter`."""
        super().add_adapter(adapter_name, resolve(peft_config, self._places), **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: DiffusionMaskedLM,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> "AdaptedModel":
        """Put the adapter in a folder or under a hub name on `model`; see `load_adapter`.

        Args:
            model: The base model, changed in place.
            model_id: Folder or hub name.
            adapter_name: Name it gets.
            is_trainable: Whether it goes on training; frozen otherwise.
            config: In place of the adapter_config.json.
            autocast_adapter_dtype: Keep the adapter in float32 beside half-precision weights.
            **kwargs: `revision`.
        """
        read = PeftConfig.from_pretrained if config is None else (lambda *_, **__: config)
        config = read(str(model_id), **kwargs)
        table = find_places(model)
        found = _read(str(model_id), config, table, kwargs.get("revision"))
        prepared = resolve(config, table, only={place for place, _ in found})
        prepared.inference_mode = not is_trainable
        adapted = cls(model, prepared, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        adapted._fill(found, adapter_name)
        return adapted if is_trainable else adapted.eval()

    def load_adapter(  # type: ignore[override]
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter from a folder or hub name, as a new one or over one that is there.

        Args:
            model_id: Folder or hub name.
            adapter_name: Of a new adapter, or of one with the same places and rank.
            is_trainable: Whether a new adapter is trained; see `PeftModel.load_adapter`.
            autocast_adapter_dtype: Keep a new adapter in float32 beside half-precision weights.
            **kwargs: `revision`; PEFT's other settings change nothing here.

        Returns:
            The keys that are missing or unexpected: none, ever.

        Raises:
            CheckpointError: A weight is missing, has no place, or is of another shape.
            ConfigError: The adapter asks for something not supported.
        """
        revision = kwargs.get("revision")
        if adapter_name in self.peft_config:
            config = self.peft_config[adapter_name]
            found = _read(str(model_id), config, self._places, revision)
            here = self.adapted_places(adapter_name)
            _refuse_surplus(found, here, str(model_id))
            check_complete(found, here, str(model_id))
        else:
            config = PeftConfig.from_pretrained(str(model_id), revision=revision)
            found = _read(str(model_id), config, self._places, revision)
            prepared = resolve(config, self._places, only={place for place, _ in found})
            prepared.inference_mode = not is_trainable
            self.add_adapter(adapter_name, prepared, autocast_adapter_dtype=autocast_adapter_dtype)
            if is_trainable:
                self.set_requires_grad(adapter_name)
        self._fill(found, adapter_name)
        if not is_trainable:
            self.eval()
        return nn.modules.module._IncompatibleKeys([], [])

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters in the published layout: official names, one pair per expert.

        Args:
            save_directory: The adapter `default` goes there, others into folders of their names.
            safe_serialization: Must be on; pickles are not written.
            selected_adapters: Names; None for all.
            save_embedding_layers: Must not be True: the base model keeps its embeddings.
            is_main_process: Whether this process writes.
            state_dict: In place of the model's own, e.g. one gathered from shards.
            **kwargs: Refused unless empty or None.

        Raises:
            ConfigError: A setting asks for something not supported.
        """
        unknown = [name for name, value in kwargs.items() if value]
        if not safe_serialization or save_embedding_layers is True or unknown:
            named = unknown or ["save_embedding_layers" if safe_serialization else "pickles"]
            raise ConfigError(f"adapters are saved as safetensors without {', '.join(named)}")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        absent = sorted(set(names) - set(self.peft_config))
        if absent:
            raise ConfigError(
                f"selected_adapters: {', '.join(absent)} not among {', '.join(self.peft_config)}"
            )
        if not is_main_process:
            return
        os.makedirs(save_directory, exist_ok=True)
        self.create_or_update_model_card(str(save_directory))
        state = self.state_dict() if state_dict is None else state_dict
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
        for name in names:
            folder = Path(save_directory) / ("" if name == "default" else name)
            folder.mkdir(exist_ok=True)
            tensors = to_file(state, self.adapted_places(name), name)
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            self._save_config(name, folder)

    def _save_config(self, adapter_name: str, folder: Path) -> None:
        config = copy.deepcopy(cast(LoraConfig, self.peft_config[adapter_name]))
        config.target_modules = self._places.suffixes(self.adapted_places(adapter_name))
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = self._backbone.name_or_path or None
        mapping = None
        if config.task_type is None:
            base = type(self._backbone)
            mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        config.save_pretrained(str(folder), auto_mapping_dict=mapping)

    def adapted_places(self, adapter_name: str) -> tuple[Place, ...]:
        """Return where the adapter `adapter_name` sits."""
        model = self._backbone
        factors: dict[str, Any] = {}
        for path in {place.module for place in self._places.places}:
            layer = model.get_submodule(path)
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
                factors[path] = layer.lora_A[adapter_name]
        return tuple(
            place
            for place in self._places.places
            if place.module in factors and hasattr(factors[place.module], place.leaf)
        )

    def merge_and_unload(self, **kwargs: Any) -> DiffusionMaskedLM:
        """Return the base model with the active adapters added to its weights.

        Raises:
            ConfigError: The base weights are quantised.
        """
        self._check_merging()
        return cast(DiffusionMaskedLM, self._tuner.merge_and_unload(**kwargs))

    def merge_adapter(self, **kwargs: Any) -> None:
        """Add adapters to the base weights until `unmerge_adapter`; see PEFT."""
        self._check_merging()
        self._tuner.merge_adapter(**kwargs)

    def _check_merging(self) -> None:
        if is_quantized(self):
            raise ConfigError(
                "the base weights are quantised, and merging would round the adapter away; load "
                "the model without quantization and merge into that"
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Mix adapters into a new one, as PEFT does for linear layers.

        Raises:
            ConfigError: Routed experts are adapted, which PEFT cannot mix.
        """
        if any(isinstance(module, ExpertLora) for module in self.modules()):
            raise ConfigError(
                "add_weighted_adapter does not know routed experts: merge one adapter"
            )
        self._tuner.add_weighted_adapter(*args, **kwargs)

    def _fill(self, found: dict[tuple[Place, str], torch.Tensor], adapter_name: str) -> None:
        self.load_state_dict(to_native(found, adapter_name), strict=False)


def resolve(
    config: PeftConfig, table: PlaceTable, only: Iterable[Place] | None = None
) -> LoraConfig:
    """Return a copy of `config` that means exact modules of ours; the caller's stays as it is.

    Args:
        config: As given by a user or a file.
        table: Places of the model.
        only: In place of what `target_modules` means: where a file has weights.

    Raises:
        ConfigError: Something is asked for that is not supported, or the targets match nothing.
    """
    _check_supported(config)
    assert isinstance(config, LoraConfig)
    places = _targeted(config, table) if only is None else table.whole_stacks(tuple(only))
    projections: dict[str, list[str]] = defaultdict(list)
    for place in places:
        if place.projection is not None and place.projection not in projections[place.module]:
            projections[place.module].append(place.projection)
    resolved = copy.deepcopy(config)
    resolved.target_modules = sorted({place.module for place in places})
    resolved.exclude_modules = resolved.layers_to_transform = resolved.layers_pattern = None
    # Attributes and no fields, as PEFT's own registry of custom modules: neither is ever saved.
    setattr(resolved, "expert_projections", dict(projections))  # noqa: B010
    resolved._register_custom_module({Experts: ExpertLora})
    return resolved


def _targeted(config: LoraConfig, table: PlaceTable) -> tuple[Place, ...]:
    targets = config.target_modules
    if targets is None:
        raise ConfigError("target_modules is not set: write all-linear, or name linear layers")
    places = table.targeted(targets)
    if config.exclude_modules:
        places = table.without(places, config.exclude_modules)
    layers = config.layers_to_transform
    if layers is not None:
        kept = {layers} if isinstance(layers, int) else set(layers)
        places = tuple(place for place in places if place.layer in kept)
    if not places:
        raise ConfigError("exclude_modules or layers_to_transform leave nothing to adapt")
    return places


def _check_supported(config: PeftConfig) -> None:
    if config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(f"adapters of type {kind} are not supported: use a peft.LoraConfig")
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name not in _HONOURED and value and value != _default(item):
            raise ConfigError(
                f"{item.name}={value!r} is not supported for adapters of memdlm: leave it out"
            )
    start = config.init_lora_weights  # type: ignore[attr-defined]
    if start not in INITIALISATIONS:
        raise ConfigError(
            f"init_lora_weights={start!r} is not supported: use True, False or 'gaussian'"
        )


def _default(item: "Field[Any]") -> Any:
    return None if item.default is MISSING else item.default


def _read(
    adapter: str, config: PeftConfig, table: PlaceTable, revision: str | None
) -> dict[tuple[Place, str], torch.Tensor]:
    """Read an adapter's factors and check them against what its config means.

    Adapters saved before experts could be adapted name their projections all the same; a file
    without any expert is one of those.
    """
    _check_supported(config)
    assert isinstance(config, LoraConfig)
    found = place_factors(read_tensors(adapter, revision), table, config.r, adapter)
    if getattr(config, "expert_projections", None) is None and config.target_modules:
        knows_experts = any(place.expert is not None for place, _ in found)
        meant = _targeted(config, table)
        expected = [place for place in meant if knows_experts or place.expert is None]
        check_complete(found, expected, adapter)
    return found


def _refuse_surplus(
    found: dict[tuple[Place, str], torch.Tensor], here: Iterable[Place], adapter: str
) -> None:
    surplus = sorted({place.official for place, _ in found} - {place.official for place in here})
    if surplus:
        raise CheckpointError(
            f"{adapter} also adapts {', '.join(surplus[:3])}, which this run does not: load it "
            "into a model with the same target_modules"
        )
