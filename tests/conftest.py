"""Small real models and batches that every folder uses. CPU, a few thousand weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from peft import LoraConfig

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.tiny import TINY_FAMILIES
from memdlm.cli import host_matmul
from memdlm.diffusion.states import CleanBatch
from tests.families import FAMILIES, MASK, PAD, VOCABULARY, Family

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_configure(config: pytest.Config) -> None:
    """Excuse the one warning that is PEFT's to mend: it reads an attribute transformers renamed."""
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep encoded rows out of the user's cache, and out of the other tests'; made when used."""
    place = tmp_path_factory.getbasetemp() / "caches" / uuid4().hex
    monkeypatch.setenv("MEMDLM_CACHE", str(place))
    return place


@pytest.fixture(autouse=True)
def own_products() -> Iterator[None]:
    """Give PyTorch its matrix products back after a test that ran a command in this process."""
    yield
    if host_matmul._in_force is not None:
        host_matmul._in_force.end()


def make_model(family: str = "llada", seed: int = 0, **overrides: Any) -> DiffusionMaskedLM:
    """Build a four-layer model with weights large enough that every part of it matters."""
    common = {
        "vocab_size": VOCABULARY,
        "mask_token_id": MASK,
        "pad_token_id": PAD,
        "eos_token_id": PAD,
    }
    torch.manual_seed(seed)
    fields = {**common, **FAMILIES[family].sizes, **overrides}
    row = TINY_FAMILIES[family]
    model = row.model_class(row.config_class(**fields))
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


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture
def traits(family: str) -> Family:
    """What sets the family at hand apart."""
    return FAMILIES[family]


@pytest.fixture
def build_lora(traits: Family) -> Callable[..., LoraConfig]:
    """The function that describes an adapter on every linear layer; stacked experts are none."""

    def build(**settings: Any) -> LoraConfig:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": list(traits.linear), **settings}
        return LoraConfig(**settings)

    return build
