"""Memories side by side in one batch: each row is what it would be alone."""

import pytest
import torch

from memdlm import MemoryConfig, ParametricMemory
from memdlm.errors import UsageError

SMALL = {"rank": 3, "alpha": 6.0, "layer_fraction": 0.5, "learning_rate": 0.5}
DRAWS = torch.Generator().manual_seed(0)
DOCUMENTS = [torch.randint(0, 59, (1, length), generator=DRAWS) for length in (14, 5, 9)]
QUESTIONS = torch.randint(0, 59, (4, 11), generator=DRAWS)


def written(model, ids, **changes) -> ParametricMemory:
    memory = ParametricMemory(model, MemoryConfig(**{**SMALL, **changes}))
    memory.write(ids)
    return memory


def logits_with(memory, model, ids):
    with memory.attached(), torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_row_of_a_stack_equals_its_memory_alone(family, kind, build_model) -> None:
    model = build_model(family)
    first, second, third = (written(model, ids, kind=kind) for ids in DOCUMENTS)
    parts = [second, None, first, third]
    stack = ParametricMemory.stack(parts)
    together = logits_with(stack, model, QUESTIONS)
    for row, part in enumerate(parts):
        question = QUESTIONS[row, None]
        alone = model(question).logits if part is None else logits_with(part, model, question)
        torch.testing.assert_close(together[row, None], alone, rtol=1e-5, atol=1e-5)
    assert (together[0] - model(QUESTIONS[:1]).logits[0]).abs().max() > 1e-3
    # A part may be erased, or the stack, without harm to the other.
    kept = logits_with(first, model, QUESTIONS[:1])
    stack.erase()
    assert torch.equal(logits_with(first, model, QUESTIONS[:1]), kept)


def test_rows_of_one_memory_go_into_a_stack_in_order(build_model) -> None:
    model = build_model("llada")
    pair = written(model, torch.cat([DOCUMENTS[0], DOCUMENTS[0].flip(1)]))
    stack = ParametricMemory.stack([None, pair])
    together = logits_with(stack, model, QUESTIONS[:3])
    for row in range(2):
        alone = logits_with(pair.row(row), model, QUESTIONS[row + 1, None])
        torch.testing.assert_close(together[row + 1, None], alone, rtol=1e-5, atol=1e-5)


def test_memories_that_differ_are_refused(build_model) -> None:
    model = build_model("llada")
    first = written(model, DOCUMENTS[0])
    for changes, message in (
        ({"rank": 2}, "one rank; layers.2.mlp.gate_proj.A is .3, 32. in one and .2, 32. in"),
        ({"alpha": 5.0}, "one scale; alpha / rank is 2 in one and 1.66667 in another"),
        ({"layer_fraction": 0.25}, "same modules .* only some have layers.2.mlp.down_proj.A"),
        ({"kind": "full"}, "only some have"),
    ):
        with pytest.raises(UsageError, match=message):
            ParametricMemory.stack([first, written(model, DOCUMENTS[1], **changes)])
    with pytest.raises(UsageError, match="different models"):
        ParametricMemory.stack([first, written(build_model("llada"), DOCUMENTS[1])])
    with pytest.raises(UsageError, match="a memory is empty"):
        ParametricMemory.stack([first, ParametricMemory(model, MemoryConfig(**SMALL))])
    for nothing in ([], [None, None]):
        with pytest.raises(UsageError, match="no memory to stack"):
            ParametricMemory.stack(nothing)


def test_a_stack_is_for_use_and_its_parts_are_for_keeping(build_model, tmp_path) -> None:
    model = build_model("llada")
    stack = ParametricMemory.stack([written(model, DOCUMENTS[0]), None])
    for use in (
        lambda: stack.save_pretrained(tmp_path / "memory"),
        lambda: stack.row(0),
        lambda: stack.write(torch.cat([DOCUMENTS[0]] * 2), extend=True),
    ):
        with pytest.raises(UsageError, match="stack of memories; use its parts"):
            use()
