"""A model that says what a test tells it to say, through the library's model contract."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from memdlm.backbones import first_attention

MASK, PAD, EOS = 9, 8, 7
VOCABULARY = 10


class ScriptedModel(nn.Module):
    """Gives `script(input_ids, attention_mask)` [B, L, V] at the positions asked for."""

    def __init__(self, script: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.script = script
        self.weight = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(0.5)
        self.config = SimpleNamespace(
            mask_token_id=MASK, pad_token_id=PAD, eos_token_id=EOS, max_position_embeddings=16
        )
        self.calls: list[SimpleNamespace] = []

    def forward(self, input_ids, attention_mask=None, position_ids=None, positions=None):
        self.calls.append(
            SimpleNamespace(
                input_ids=input_ids,
                attention_mask=attention_mask,
                positions=positions,
                training=self.training,
                has_grad=torch.is_grad_enabled(),
            )
        )
        logits = self.script(input_ids, attention_mask)
        index = positions[..., None].expand(-1, -1, logits.shape[-1])
        return SimpleNamespace(logits=logits.gather(1, index))


class MixingModel(nn.Module):
    """A tiny random network whose logits at a position depend on every visible token."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        width = 16
        self.embed = nn.Parameter(torch.randn(VOCABULARY, width, generator=generator))
        self.place = nn.Parameter(torch.randn(16, width, generator=generator))
        self.head = nn.Parameter(torch.randn(width, VOCABULARY, generator=generator))
        self.config = SimpleNamespace(
            mask_token_id=MASK, pad_token_id=PAD, eos_token_id=EOS, max_position_embeddings=16
        )

    def forward(self, input_ids, attention_mask=None, position_ids=None, positions=None):
        hidden = self.embed[input_ids] + self.place[: input_ids.shape[1]]
        scores = hidden @ hidden.transpose(1, 2) / 4
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, float("-inf"))
        logits = torch.tanh(hidden + scores.softmax(-1) @ hidden) @ self.head
        index = positions[..., None].expand(-1, -1, VOCABULARY)
        return SimpleNamespace(logits=logits.gather(1, index))


@pytest.fixture(autouse=True)
def small_canvases_are_decoded_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_attention, "FEWEST_STANDING", 0)


@pytest.fixture
def scripted_model() -> type[ScriptedModel]:
    return ScriptedModel


@pytest.fixture
def mixing_model() -> MixingModel:
    return MixingModel()
