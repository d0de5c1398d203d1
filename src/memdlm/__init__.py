"""memdlm: train, run and evaluate memory-enhanced diffusion language models (arXiv 2603.22241).

Importing memdlm makes `AutoModelForMaskedLM.from_pretrained` read the official checkpoints of every
family natively. Names below are loaded on first use, so the import itself stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from memdlm._registration import register_with_transformers

if TYPE_CHECKING:
    from memdlm.backbones.adapters import add_lora
    from memdlm.diffusion.objective import ObjectiveConfig
    from memdlm.inference import generate
    from memdlm.memory.config import MemoryConfig
    from memdlm.memory.parametric_memory import ParametricMemory
    from memdlm.sampling.config import SamplingConfig
    from memdlm.training.config import MemDLMConfig
    from memdlm.training.trainer import MemDLMTrainer

register_with_transformers()

__version__ = "0.1.0"

_PUBLIC = {
    "MemDLMConfig": "memdlm.training.config",
    "MemDLMTrainer": "memdlm.training.trainer",
    "MemoryConfig": "memdlm.memory.config",
    "ObjectiveConfig": "memdlm.diffusion.objective",
    "ParametricMemory": "memdlm.memory.parametric_memory",
    "SamplingConfig": "memdlm.sampling.config",
    "add_lora": "memdlm.backbones.adapters",
    "generate": "memdlm.inference",
}

__all__ = [
    "MemDLMConfig",
    "MemDLMTrainer",
    "MemoryConfig",
    "ObjectiveConfig",
    "ParametricMemory",
    "SamplingConfig",
    "add_lora",
    "generate",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'memdlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, those not yet imported included."""
    return sorted({*globals(), *_PUBLIC})
