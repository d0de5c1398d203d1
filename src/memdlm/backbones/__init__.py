"""Networks: one file per family, all with the same split forward. Importing registers them."""

from memdlm.backbones.base import DiffusionMaskedLM, DiffusionModel, Interlude
from memdlm.backbones.dream import DreamConfig, DreamForMaskedLM
from memdlm.backbones.experts import Experts
from memdlm.backbones.layer_inputs import LayerInputs
from memdlm.backbones.llada import LLaDAConfig, LLaDAForMaskedLM
from memdlm.backbones.llada2 import LLaDA2Config, LLaDA2ForMaskedLM
from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM
from memdlm.backbones.wrapping import backbone_of, unwrap

__all__ = [
    "DiffusionMaskedLM",
    "DiffusionModel",
    "DreamConfig",
    "DreamForMaskedLM",
    "Experts",
    "Interlude",
    "LLaDA2Config",
    "LLaDA2ForMaskedLM",
    "LLaDAConfig",
    "LLaDAForMaskedLM",
    "LLaDAMoEConfig",
    "LLaDAMoEForMaskedLM",
    "LayerInputs",
    "backbone_of",
    "unwrap",
]
