"""Whole forwards keep what stands in the first layer, and answer as forwards that keep nothing."""

import pytest
import torch
from torch import nn

from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.token_choice import row_draws
from tests.families import MASK

MODES = {
    "greedy": {},
    "blocks": {"block_length": 4, "temperature": 1.0},
    "guided": {"guidance_scale": 0.5},
    "ends": {"stop_tokens": tuple(range(0, 59, 3)), "temperature": 1.0},
    "masks inside the prompts": {"infill": True, "stop_at_eos": False, "stop_tokens": ()},
}


class Plain(nn.Module):
    """A wrapper of a user's, who knows the arguments of the contract only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, ids, attention_mask=None, positions=None):
        return self.model(ids, attention_mask=attention_mask, positions=positions)


def prompts_of(infill: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 59, (length,), generator=generator) for length in (19, 24, 15)]
    if infill:
        for number, prompt in enumerate(prompts):
            prompt[1 : 3 + number] = MASK
    return prompts


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_forwards_that_keep_nothing(family, build_model, mode):
    model = build_model(family).eval()
    config = SamplingConfig(max_new_tokens=8, decoder="masked", **MODES[mode])
    prompts = prompts_of(config.infill)
    attention = model.model.layers[0].self_attn
    projection = getattr(attention, "k_proj", None) or attention.query_key_value
    widths: list[int] = []
    handle = projection.register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    found = decode(model, prompts, config, draw=row_draws(range(3)))
    handle.remove()
    expected = decode(Plain(model), prompts, config, draw=row_draws(range(3)))
    assert torch.equal(found.unmask_step, expected.unmask_step)
    assert torch.equal(found.canvas, expected.canvas)
    # One whole forward for each canvas, then the slots alone.
    num_whole = 2 if mode == "guided" else 1
    assert len(widths) == found.num_forwards > num_whole
    whole, slots = (24, 4) if config.infill else (32, 8)
    assert widths == [whole] * num_whole + [slots] * (len(widths) - num_whole)


def test_nothing_is_kept_where_most_of_the_canvas_changes(build_model):
    model = build_model("llada").eval()
    widths: list[int] = []
    model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    decode(model, [torch.tensor([1, 2, 3])], SamplingConfig(max_new_tokens=8))
    assert set(widths) == {11}
