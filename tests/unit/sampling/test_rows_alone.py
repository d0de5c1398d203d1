"""A row gives the tokens, in the steps, from the logits that it has when it is decoded alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from memdlm.backbones.batch_rows import present_rows
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6, 1, 2, 2])]
WITH_MASKS = [
    torch.tensor([9, 2, 9, 9, 1, 3, 9]),
    torch.tensor([9]),
    torch.tensor([4, 9, 9, 9, 5, 9, 9, 9, 9, 1, 9]),
]
POLICIES = {
    "low_confidence": {},
    "random": {"policy": "random"},
    "margin": {"policy": "margin"},
    "entropy": {"policy": "entropy"},
    "independent": {"policy": "independent"},
}
MODES = {
    "plain": {},
    "two per step": {"num_unmasking_steps": 4},
    "blocks": {"block_length": 4, "step_schedule": "cosine"},
    "uneven blocks": {"block_length": 3, "num_unmasking_steps": 5, "uneven_blocks": True},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 3, "block_length": 4},
    "top-p": {"temperature": 1.0, "top_p": 0.7, "confidence_source": "sampling"},
    "dream": {"step_schedule": "dream", "num_unmasking_steps": 5},
    "guidance": {"guidance_scale": 0.5},
    "early stop": {"stop_tokens": (2, 5), "block_length": 2, "stop_at_eos": True},
    "deferred ends": {"stop_tokens": (2, 5), "end_tokens": "defer"},
    "suppressed ends": {"stop_tokens": (2, 5), "end_tokens": "suppress"},
    "late ends": {"stop_tokens": (2, 5), "min_new_tokens": 5, "block_length": 4},
}
MORE = {
    "threshold": {"threshold": 0.7, "block_length": 4},
    "threshold and early stop": {
        "threshold": 0.8,
        "block_length": 2,
        "stop_at_eos": True,
        "stop_tokens": (2, 5),
        "temperature": 0.5,
    },
    "threshold on the margin": {"threshold": 0.1, "policy": "margin"},
    "alg_temp": {"confidence_temperature": 0.2, "policy": "entropy", "step_schedule": "dream"},
}
SETTINGS = {
    **{f"{policy}, {mode}": {**POLICIES[policy], **MODES[mode]} for policy in POLICIES
       for mode in MODES},
    **MORE,
}  # fmt: skip


class Recorder(nn.Module):
    """Keeps the rows, positions and logits of every call of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.calls: list[SimpleNamespace] = []

    def forward(self, ids, attention_mask=None, positions=None):
        output = self.model(ids, attention_mask=attention_mask, positions=positions)
        rows = range(len(ids)) if present_rows() is None else present_rows().tolist()
        assert len(rows) == len(ids)
        self.calls.append(
            SimpleNamespace(rows=list(rows), positions=positions, logits=output.logits)
        )
        return output


def check_rows(model, prompts, config):
    together = Recorder(model)
    batch = decode(together, prompts, config)
    shuffled = decode(model, prompts[::-1], config)
    for row, prompt in enumerate(prompts):
        recorder = Recorder(model)
        alone = decode(recorder, [prompt], config)
        width = alone.canvas.shape[1]
        assert torch.equal(batch.tokens[row], alone.tokens[0])
        assert torch.equal(shuffled.tokens[-1 - row], alone.tokens[0])
        assert torch.equal(batch.canvas[row, :width], alone.canvas[0])
        assert torch.equal(batch.unmask_step[row, :width], alone.unmask_step[0])
        assert batch.tokens_per_step[row] == alone.tokens_per_step[0]
        assert batch.ended[row] == alone.ended[0]
        # A row that is done leaves the batch: it is in no more calls than when it is alone.
        calls = [call for call in together.calls if row in call.rows]
        assert calls == together.calls[: len(calls)]
        for here, there in zip(calls, recorder.calls, strict=True):
            place, slots = here.rows.index(row), there.positions.shape[1]
            is_same = here.positions[place, :slots] == there.positions[0]
            assert is_same.all()
            torch.testing.assert_close(
                here.logits[place, :slots], there.logits[0], atol=1e-5, rtol=1e-5
            )
    return batch


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_appended_slots(mixing_model, settings):
    config = SamplingConfig(max_new_tokens=8, seed=3, **{"stop_at_eos": False, **settings})
    batch = check_rows(mixing_model, PROMPTS, config)
    if not config.stop_at_eos:
        assert all(sum(counts) == 8 for counts in batch.tokens_per_step)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_length": 4, "num_unmasking_steps": 6, "step_schedule": "linear"},
        {"block_length": 4, "temperature": 1.0},
    ],
)
def test_slots_inside_the_prompts(mixing_model, policy, settings):
    config = SamplingConfig(infill=True, policy=policy, seed=3, **settings)
    batch = check_rows(mixing_model, WITH_MASKS, config)
    for tokens, prompt in zip(batch.tokens, WITH_MASKS, strict=True):
        assert (tokens != 9).all()
        assert torch.equal(tokens[prompt != 9], prompt[prompt != 9])


@pytest.mark.parametrize(
    "settings", [MORE["threshold and early stop"], {"policy": "margin", "num_unmasking_steps": 4}]
)
def test_every_family(family, build_model, settings):
    model = build_model(family).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 20, (length,), generator=generator) for length in (9, 2, 5)]
    config = SamplingConfig(max_new_tokens=8, seed=1, decoder="masked", **settings)
    check_rows(model, prompts, config)


def test_rows_really_go_at_their_own_pace(mixing_model):
    config = SamplingConfig(max_new_tokens=8, stop_at_eos=False, **MORE["threshold"])
    output = decode(mixing_model, PROMPTS, config)
    lengths = {len(counts) for counts in output.tokens_per_step}
    assert len(lengths) > 1
    assert output.num_forwards == max(lengths) < 8
