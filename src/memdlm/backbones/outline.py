"""A network as its config.json describes it: shapes and types on the meta device, no weights."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.loading import DTYPES, check_architecture
from memdlm.backbones.reading import readable
from memdlm.errors import CheckpointError, ConfigError

# What safetensors calls the types of `DTYPES`.
_FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def load_outline(name: str, dtype: str = "auto") -> DiffusionMaskedLM:
    """Build the network of a checkpoint of which no more than config.json need exist.

    Args:
        name: Folder or hub name in the official layout.
        dtype: Weights' type, one of `DTYPES`; "auto" takes config.json's, else that of the weights.

    Raises:
        CheckpointError: There is no config.json, or it names no supported architecture.
        ConfigError: `dtype` is unknown, or "auto" where neither config.json nor weights tell.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if (Path(name) / "adapter_config.json").is_file():
        raise CheckpointError(f"{name} is an adapter: name the folder of its base model")
    check_architecture(name)
    with readable(name, "config.json"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    weight_dtype = _stated_dtype(name, config) if dtype == "auto" else getattr(torch, dtype)
    with readable(name, "config.json"), torch.device("meta"):
        model: DiffusionMaskedLM = AutoModelForMaskedLM.from_config(config, dtype=weight_dtype)
    return model


def _stated_dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for file in sorted(Path(name).glob("*.safetensors")):
        with readable(name, "weights"), safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                found = tensors.get_slice(key).get_dtype()
                if found in _FILE_DTYPES:
                    stated: torch.dtype = getattr(torch, _FILE_DTYPES[found])
                    return stated
    raise ConfigError(
        f"dtype: config.json of {name} does not say it and there are no weights to ask; set dtype, "
        "e.g. dtype: bfloat16"
    )
