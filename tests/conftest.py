"""Small real models and batches that every folder uses. CPU, a few thousand weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.dream import DreamConfig, DreamForMaskedLM
from memdlm.backbones.llada import LLaDAConfig, LLaDAForMaskedLM
from memdlm.backbones.llada2 import LLaDA2Config, LLaDA2ForMaskedLM
from memdlm.backbones.llada_moe import LLaDAMoEConfig, LLaDAMoEForMaskedLM
from memdlm.diffusion.states import CleanBatch

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARY, PAD, MASK = 61, 59, 60


def pytest_configure(config: pytest.Config) -> None:
    """Excuse the one warning that is PEFT's to mend: it reads an attribute transformers renamed."""
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    )


DENSE_LLADA = {
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 40,
    "init_std": 0.2,
    "max_sequence_length": 64,
}
OTHERS = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
GROUPS = {"moe_intermediate_size": 20, "n_group": 3, "topk_group": 2}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llada": (LLaDAConfig, LLaDAForMaskedLM, DENSE_LLADA),
    "llada_moe": (
        LLaDAMoEConfig,
        LLaDAMoEForMaskedLM,
        {**OTHERS, **EXPERTS, "dense_intermediate_size": 40, "expert_intermediate_size": 20},
    ),
    "llada2": (
        LLaDA2Config,
        LLaDA2ForMaskedLM,
        {**OTHERS, **EXPERTS, **GROUPS, "num_key_value_heads": 2, "intermediate_size": 40},
    ),
    "dream": (
        DreamConfig,
        DreamForMaskedLM,
        {**OTHERS, "num_key_value_heads": 2, "intermediate_size": 40},
    ),
}


def make_model(family: str = "llada", seed: int = 0, **overrides: Any) -> DiffusionMaskedLM:
    """Build a four-layer model with weights large enough that every part of it matters."""
    common = {
        "vocab_size": VOCABULARY,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        "eos_token_id": PAD,
    }
    config_class, model_class, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**common, **sizes, **overrides}))
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):  # biases start at zero, which would hide what they do
            torch.nn.init.normal_(tensor, std=0.2)
    return model


def make_batch(
    lengths: tuple[int, ...] = (12, 9, 14), prompt: int = 3, seed: int = 0
) -> CleanBatch:
    """Make rows of random tokens: a prompt, a response, and right padding with pad labels."""
    draws = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    clean = torch.full((len(lengths), longest), PAD)
    labels = clean.clone()
    padding = torch.ones_like(clean, dtype=torch.bool)
    for row, length in enumerate(lengths):
        clean[row, :length] = torch.randint(0, PAD, (length,), generator=draws)
        labels[row, :length] = clean[row, :length]
        labels[row, :prompt] = -100
        padding[row, :length] = False
    return CleanBatch.from_labels(clean, labels, padding)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of recorded numbers."""
    return FIXTURES


@pytest.fixture
def build_model() -> Callable[..., DiffusionMaskedLM]:
    """The function that builds a tiny model of a family."""
    return make_model


@pytest.fixture
def build_batch() -> Callable[..., CleanBatch]:
    """The function that builds a padded batch of random rows."""
    return make_batch


@pytest.fixture(params=["llada", "llada_moe"])
def family(request: pytest.FixtureRequest) -> str:
    """Dense and mixture-of-experts."""
    return request.param
