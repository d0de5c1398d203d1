"""Streams give each token once, in order, when nothing to its left can change."""

from itertools import chain

import pytest
import torch

from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.streaming import decode_stream

MASK, EOS, VOCABULARY = 9, 7, 10
PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6, 1, 2, 2])]


def drain(stream):
    updates = []
    while True:
        try:
            updates.append(next(stream))
        except StopIteration as end:
            return updates, end.value


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_length": 4, "threshold": 0.6},
        {"stop_tokens": (2, 5)},
        {"stop_tokens": (2, 5), "stop_early": False},
        {"stop_at_eos": False, "policy": "random"},
    ],
)
def test_a_stream_adds_up_to_the_decode(mixing_model, settings):
    config = SamplingConfig(max_new_tokens=8, **settings)
    updates, output = drain(decode_stream(mixing_model, PROMPTS, config))
    whole = decode(mixing_model, PROMPTS, config)
    for row, tokens in enumerate(whole.tokens):
        assert list(chain.from_iterable(u.new_tokens[row] for u in updates)) == tokens.tolist()
        assert torch.equal(output.tokens[row], tokens)
        finished = [update.finished[row] for update in updates]
        assert finished == sorted(finished)
        assert finished[-1]
        # Nothing comes after a row is finished.
        assert not any(
            update.new_tokens[row]
            for update, before in zip(updates[1:], finished, strict=False)
            if before
        )
    assert len(updates) == whole.num_forwards


@pytest.mark.parametrize("settings", [{"block_length": 1}, {"block_length": 4, "threshold": 0.6}])
def test_a_stream_ends_where_an_answer_is_complete(mixing_model, settings):
    config = SamplingConfig(max_new_tokens=8, stop_at_eos=False, **settings)

    def is_complete(row, tokens):
        return row != 1 and len(tokens) >= 3

    updates, output = drain(decode_stream(mixing_model, PROMPTS, config, is_complete=is_complete))
    whole = decode(mixing_model, PROMPTS, config, is_complete=is_complete)
    for row, tokens in enumerate(whole.tokens):
        streamed = list(chain.from_iterable(u.new_tokens[row] for u in updates))
        assert streamed == tokens.tolist() == output.tokens[row].tolist()
        # It is finished with the update that completes it, not with the last one of the batch.
        first = next(i for i, update in enumerate(updates) if update.finished[row])
        assert not any(update.new_tokens[row] for update in updates[first + 1 :])
        assert (first < len(updates) - 1) == (row != 1)


def test_only_what_stands_without_a_gap_is_given(scripted_model):
    def script(input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for column, (token, sureness) in enumerate([(2, 3.0), (3, 2.0), (4, 9.0), (EOS, 1.0)]):
            logits[:, column + 1, token] = sureness
        return logits

    updates, _ = drain(
        decode_stream(scripted_model(script), [torch.tensor([6])], SamplingConfig(max_new_tokens=4))
    )
    assert [update.new_tokens for update in updates] == [[[]], [[2]], [[3, 4]], [[]]]
    assert [update.finished for update in updates] == [[False], [False], [False], [True]]


def test_an_infilled_prompt_streams_as_far_as_it_is_filled(mixing_model):
    prompts = [torch.tensor([3, MASK, 4, MASK]), torch.tensor([MASK, 2])]
    config = SamplingConfig(infill=True, block_length=2)
    updates, output = drain(decode_stream(mixing_model, prompts, config))
    assert updates[0].new_tokens[0][0] == 3
    for row, tokens in enumerate(output.tokens):
        assert list(chain.from_iterable(u.new_tokens[row] for u in updates)) == tokens.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.2},
        {"threshold": 0.1, "editing_threshold": 0.05, "max_editing_steps": 2},
        {"threshold": 0.2, "abandon_block_at_eos": True, "stop_tokens": tuple(range(20))},
        {"threshold": 0.2, "abandon_block_at_eos": True, "stop_tokens": tuple(range(20)),
         "stop_at_eos": False},
    ],
)  # fmt: skip
def test_block_decoding_streams_what_it_will_not_edit(build_model, settings):
    model = build_model("llada2").eval()
    prompts = [torch.arange(1, 8), torch.tensor([4])]
    config = SamplingConfig(max_new_tokens=10, block_length=4, decoder="block", **settings)
    updates, output = drain(decode_stream(model, prompts, config))
    whole = decode(model, prompts, config)
    for row, tokens in enumerate(whole.tokens):
        streamed = list(chain.from_iterable(u.new_tokens[row] for u in updates))
        assert streamed == tokens.tolist() == output.tokens[row].tolist()
    assert updates[-1].finished == [True, True]


def test_a_closed_stream_gives_the_model_its_mode_back(scripted_model):
    model = scripted_model(lambda ids, mask: torch.zeros(*ids.shape, VOCABULARY)).train()
    stream = decode_stream(model, [torch.tensor([6])], SamplingConfig(max_new_tokens=4))
    next(stream)
    assert not model.training
    assert torch.is_grad_enabled()
    stream.close()
    assert model.training
    assert len(model.calls) == 1
