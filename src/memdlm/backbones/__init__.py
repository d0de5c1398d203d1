"""Networks: one file per family, all with the same split forward. Importing registers them."""

from memdlm.backbones.base import DiffusionMaskedLM, DiffusionModel, Interlude, LayerInputs
from memdlm.backbones.experts import Experts
from memdlm.backbones.llada import LLaDAConfig, LLaDAForMaskedLM
from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM

__all__ = [
    "DiffusionMaskedLM",
    "DiffusionModel",
    "Experts",
    "Interlude",
    "LLaDAConfig",
    "LLaDAForMaskedLM",
    "LLaDAMoEConfig",
    "LLaDAMoEForMaskedLM",
    "LayerInputs",
]
