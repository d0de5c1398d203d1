"""The bound on an answer's likelihood against figures worked by hand, on scripted logits."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from memdlm.evaluation.retrieval_probe.answer_likelihood import answer_nll

VOCAB, PAD, MASK = 10, 0, 9


class Scripted(nn.Module):
    """Gives every clean token the probability 2^-m while m of the answer's tokens are masked."""

    def __init__(self, answers: list[list[int]]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.answers = answers
        self.config = SimpleNamespace(mask_token_id=MASK, pad_token_id=PAD)
        self.masked: list[list[int]] = []

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor
    ) -> object:
        logits = torch.zeros(*positions.shape, VOCAB)
        counts = (input_ids == MASK).sum(dim=1).tolist()
        self.masked.append(counts)
        for row, answer in enumerate(self.answers):
            p = 2.0 ** -counts[row]
            logits[row] = math.log((1 - p) / (VOCAB - 1)) if p < 1 else -1e4
            columns = positions[row, : len(answer)]
            assert len(columns) == len(answer)
            logits[row, torch.arange(len(answer)), torch.tensor(answer)] = math.log(p)
        return SimpleNamespace(logits=logits)


def test_each_step_adds_what_it_reveals_times_the_mean_of_what_is_masked() -> None:
    model = Scripted([[4, 5, 6], [7]])
    prompts = [torch.tensor([1, 2]), torch.tensor([3])]
    answers = [torch.tensor([4, 5, 6]), torch.tensor([7])]
    found = answer_nll(model, prompts, answers, [0, 1])
    # Three tokens: 3, 2 and 1 masked, one revealed each time; a token is worth m log 2.
    assert found == pytest.approx([(3 + 2 + 1) * math.log(2), math.log(2)], rel=1e-5)
    assert model.masked == [[3, 1], [2, 0], [1, 0]]


def test_fewer_steps_reveal_several_tokens_at_once() -> None:
    model = Scripted([[4, 5, 6]])
    found = answer_nll(model, [torch.tensor([1, 2])], [torch.tensor([4, 5, 6])], [0], num_steps=2)
    # Two of three with 3 masked, then the last one.
    assert found == pytest.approx([(2 * 3 + 1) * math.log(2)], rel=1e-5)
    assert model.masked == [[3], [1]]


def test_the_prompt_and_the_revealed_tokens_are_seen(build_model: Callable[..., nn.Module]) -> None:
    model = build_model("llada", 0).train()
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    answer_nll(model, [torch.tensor([5, 6, 7])], [torch.tensor([8, 9])], [0])
    handle.remove()
    mask = model.config.mask_token_id
    assert seen[0].tolist() == [[5, 6, 7, mask, mask]]
    assert seen[1].tolist() in ([[5, 6, 7, 8, mask]], [[5, 6, 7, mask, 9]])
    assert model.training


def test_a_row_depends_on_its_seed_and_not_on_its_batch(
    build_model: Callable[..., nn.Module], family: str
) -> None:
    model = build_model(family, 0)
    draws = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 50, (4 + i % 5,), generator=draws) for i in range(16)]
    answers = [torch.randint(3, 50, (2 + i % 4,), generator=draws) for i in range(16)]
    seeds = list(range(16))
    together = answer_nll(model, prompts, answers, seeds)
    alone = [
        answer_nll(model, [prompt], [answer], [seed])[0]
        for prompt, answer, seed in zip(prompts, answers, seeds, strict=True)
    ]
    assert together == pytest.approx(alone, rel=1e-4)
    other = answer_nll(model, prompts, answers, [seed + 100 for seed in seeds])
    assert other != pytest.approx(together, rel=1e-3)
