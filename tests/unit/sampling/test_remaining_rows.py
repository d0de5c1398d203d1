"""Rows that are done leave the batch: forwards get smaller, and nobody's answer changes."""

from contextlib import nullcontext

import pytest
import torch

from memdlm.backbones.batch_rows import only_rows, present_rows
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.remaining_rows import RemainingRows
from memdlm.sampling.token_choice import row_draws
from tests.families import MASK

# Half of a row's tokens end its answer, so that rows end in different steps.
ENDS = tuple(range(0, 59, 2))
NEW = 12
MASKED = {
    "whole": {},
    "blocks": {"block_length": 4},
    "guided": {"guidance_scale": 0.5},
    "prefix cache": {"cache": "prefix", "block_length": 4},
    "dual cache": {"cache": "dual", "block_length": 4, "guidance_scale": 0.5},
    "masks inside the prompts": {"infill": True, "stop_at_eos": False, "stop_tokens": ()},
}
BLOCKS = {"exact cache": {}, "no cache": {"cache": "none"}, "editing": {"editing_threshold": 0.02}}


def settings_of(family: str) -> dict[str, dict[str, object]]:
    common = {"max_new_tokens": NEW, "stop_tokens": ENDS, "temperature": 1.0}
    own = {name: {**common, "decoder": "masked", **more} for name, more in MASKED.items()}
    if family == "llada2":
        for name, more in BLOCKS.items():
            own[name] = {**common, "decoder": "block", "block_length": 4, **more}
    return own


def watch(model) -> list[int]:
    """Return a list that fills with the number of rows of every forward."""
    sizes: list[int] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, args: sizes.append(args[0].shape[0])
    )
    return sizes


def prompts_of(infill: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, 59, (length,), generator=generator) for length in (9, 14, 5, 11, 9, 6)
    ]
    if infill:
        for number, prompt in enumerate(prompts):
            prompt[1 : 2 + number] = MASK
    return prompts


@pytest.mark.parametrize("memory", [None, "sequence", "batch"])
def test_forwards_have_the_rows_that_are_not_done(family, build_model, memory):
    model = build_model(family).eval()
    for name, settings in settings_of(family).items():
        config = SamplingConfig(**settings)
        prompts = prompts_of(config.infill)
        held = nullcontext()
        if memory is not None:
            written = ParametricMemory(model, MemoryConfig(sharing=memory, learning_rate=5.0))
            written.write(torch.stack([prompt[:5] for prompt in prompts_of(False)]), seed=3)
            held = written.attached()
        sizes = watch(model)
        with held:
            together = decode(model, prompts, config, draw=row_draws(range(len(prompts))))
        assert sizes[0] == len(prompts) and min(sizes) < len(prompts), name
        assert sizes == sorted(sizes, reverse=True), name
        assert present_rows() is None
        for row, prompt in enumerate(prompts):
            held = nullcontext()
            if memory is not None:
                held = (written if memory == "batch" else written.row(row)).attached()
            with held:
                alone = decode(model, [prompt], config, draw=row_draws([row]))
            assert torch.equal(together.tokens[row], alone.tokens[0]), (name, row)
            assert together.tokens_per_step[row] == alone.tokens_per_step[0], (name, row)


def test_rows_leave_for_good_and_keep_their_places():
    rows = RemainingRows()
    values = torch.arange(4)[:, None]
    assert rows.leave([False] * 4, torch.device("cpu")) is None
    assert torch.equal(rows.take(values), values)
    assert rows.choose("abcd") == list("abcd")
    assert rows.leave([False, True, False, False], torch.device("cpu")).tolist() == [0, 2, 3]
    assert rows.leave([True, True, False, False], torch.device("cpu")).tolist() == [1, 2]
    assert rows.leave([True, True, False, False], torch.device("cpu")) is None
    assert rows.take(values).flatten().tolist() == [2, 3]
    assert rows.choose("abcd") == ["c", "d"]
    with rows.in_forward():
        assert present_rows().tolist() == [2, 3]
    assert present_rows() is None
    assert rows.spread(torch.tensor([[5.0], [6.0]]), 4).flatten().tolist() == [0, 0, 5, 6]


def test_which_rows_a_forward_has_is_forgotten_when_it_fails():
    with pytest.raises(RuntimeError), only_rows(torch.tensor([1])):
        raise RuntimeError
    assert present_rows() is None
