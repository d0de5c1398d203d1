"""The real shapes build, on the meta device, with the published numbers of parameters."""

import pytest
import torch

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.dream import DreamConfig, DreamForMaskedLM
from memdlm.backbones.experts import Experts
from memdlm.backbones.llada import LLaDAConfig, LLaDAForMaskedLM
from memdlm.backbones.llada2 import LLaDA2Config, LLaDA2ForMaskedLM
from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM

LLADA2_FLASH = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
}
DENSE_8B = {"mlp_hidden_size": 12288}


def count(model: DiffusionMaskedLM, is_table_active: bool) -> tuple[float, float]:
    """Return all parameters and those that one token uses, in units of 10^9.

    Publishers differ on whether the table of input embeddings, of which a token reads one row, is
    used by it.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    idle = sum(
        sum(weight.numel() for weight in module.parameters())
        * (1 - config.num_experts_per_tok / config.num_experts)
        for module in model.modules()
        if isinstance(module, Experts)
    )
    if not is_table_active:
        idle += model.get_input_embeddings().weight.numel()
    return total / 1e9, (total - idle) / 1e9


@pytest.mark.parametrize(
    ("config", "model_class", "total", "active", "is_table_active", "mask"),
    [
        (LLaDAConfig(**DENSE_8B), LLaDAForMaskedLM, (7.95, 8.05), (7.95, 8.05), True, 126336),
        (LLaDAMoEConfig(), LLaDAMoEForMaskedLM, (7.0, 7.4), (1.35, 1.45), False, 156895),
        (LLaDA2Config(), LLaDA2ForMaskedLM, (15.9, 16.5), (1.35, 1.45), True, 156895),
        (LLaDA2Config(**LLADA2_FLASH), LLaDA2ForMaskedLM, (99, 104), (6.0, 6.2), True, 156895),
        (DreamConfig(), DreamForMaskedLM, (7.55, 7.65), (7.55, 7.65), True, 151666),
    ],
    ids=["LLaDA-8B", "LLaDA-MoE-7B-A1B", "LLaDA2.1-mini", "LLaDA2.x-flash", "Dream-7B"],
)
def test_real_shapes_have_the_published_size(
    config, model_class, total, active, is_table_active, mask
):
    with torch.device("meta"):
        model = model_class(config)
    measured = count(model, is_table_active)
    assert total[0] <= measured[0] <= total[1], measured
    assert active[0] <= measured[1] <= active[1], measured
    assert config.mask_token_id == mask
