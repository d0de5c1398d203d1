"""What may end a response, when a row is done, and which tokens have to wait."""

import pytest
import torch

from memdlm.errors import ConfigError, UsageError
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.end_of_text import has_ended

MASK, EOS, VOCABULARY = 9, 7, 10
PROMPT = [torch.tensor([6])]


def saying(tokens, sureness):
    """Script: slot i (column i + 1) says `tokens[i]` with logit `sureness[i]`, else token 1."""

    def script(input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[..., 1] = 0.5
        for slot, (token, logit) in enumerate(zip(tokens, sureness, strict=True)):
            logits[:, slot + 1, token] = logit
        return logits

    return script


def test_a_row_is_done_once_its_end_and_everything_before_it_stand(scripted_model):
    # The end of text, the surest, comes first; the row goes on until slot 0 is filled.
    model = scripted_model(saying([2, EOS, 3, 4], [2.0, 9.0, 4.0, 1.0]))
    output = decode(model, PROMPT, SamplingConfig(max_new_tokens=4))
    assert output.unmask_step.tolist() == [[-1, 2, 0, 1, -1]]
    assert output.canvas.tolist() == [[6, 2, EOS, 3, MASK]]
    assert output.tokens[0].tolist() == [2]
    assert output.ended == [True]
    assert output.tokens_per_step == [[1, 1, 1]]
    assert output.num_forwards == len(model.calls) == 3


def test_later_blocks_of_a_row_that_ended_are_not_decoded(scripted_model):
    model = scripted_model(saying([2, EOS, 3, 4, 3, 4], [2.0] * 6))
    config = SamplingConfig(max_new_tokens=6, block_length=2)
    assert decode(model, PROMPT, config).num_forwards == 2
    whole = decode(
        model, PROMPT, SamplingConfig(max_new_tokens=6, block_length=2, stop_early=False)
    )
    assert whole.num_forwards == 6
    assert whole.tokens[0].tolist() == [2]


def test_one_row_may_end_while_another_goes_on(scripted_model):
    def script(input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        ends = input_ids[:, 0] == 6
        logits[..., 2] = 1.0
        logits[ends, 1, EOS] = 5.0
        return logits

    model = scripted_model(script)
    prompts = [torch.tensor([6]), torch.tensor([5])]
    output = decode(model, prompts, SamplingConfig(max_new_tokens=4, block_length=1))
    assert [len(counts) for counts in output.tokens_per_step] == [1, 4]
    assert [tokens.tolist() for tokens in output.tokens] == [[], [2, 2, 2, 2]]
    assert output.canvas.tolist() == [[6, EOS, MASK, MASK, MASK], [5, 2, 2, 2, 2]]
    assert output.ended == [True, False]


def test_an_answer_is_the_same_with_and_without_an_early_stop(mixing_model):
    prompts = [torch.tensor([token, 3]) for token in range(7)]
    stopped = 0
    for policy in ("low_confidence", "random", "independent"):
        settings = {"max_new_tokens": 8, "block_length": 4, "policy": policy, "stop_tokens": (2, 4)}
        early = decode(mixing_model, prompts, SamplingConfig(**settings))
        whole = decode(mixing_model, prompts, SamplingConfig(**settings, stop_early=False))
        assert [row.tolist() for row in early.tokens] == [row.tolist() for row in whole.tokens]
        stopped += int((early.canvas == MASK).sum())
    assert stopped > 0


@pytest.mark.parametrize("eos", [None, [EOS, 3]])
def test_stop_tokens_join_those_of_the_model(scripted_model, eos):
    model = scripted_model(saying([2, 5, 3, 4], [2.0] * 4))
    model.config.eos_token_id = eos
    config = SamplingConfig(max_new_tokens=4, stop_tokens=(5,))
    assert decode(model, PROMPT, config).tokens[0].tolist() == [2]


def test_suppressed_ends_are_never_said(scripted_model):
    model = scripted_model(saying([2, EOS, 5, 4], [2.0] * 4))
    config = SamplingConfig(max_new_tokens=4, end_tokens="suppress", stop_tokens=(5,))
    assert decode(model, PROMPT, config).tokens[0].tolist() == [2, 1, 1, 4]


def test_the_first_tokens_cannot_end_the_response(scripted_model):
    model = scripted_model(saying([EOS] * 6, [9.0] * 6))
    for block_length in (2, 3, 6):
        config = SamplingConfig(max_new_tokens=6, block_length=block_length, min_new_tokens=3)
        assert decode(model, PROMPT, config).tokens[0].tolist() == [1, 1, 1]
    config = SamplingConfig(max_new_tokens=6, min_new_tokens=6)
    assert decode(model, PROMPT, config).tokens[0].tolist() == [1] * 6


@pytest.mark.parametrize("policy", ["low_confidence", "margin", "entropy", "random"])
def test_deferred_ends_are_committed_last_in_their_block(scripted_model, policy):
    model = scripted_model(saying([2, EOS, 3, EOS], [2.0, 9.0, 4.0, 8.0]))
    config = SamplingConfig(
        max_new_tokens=4, end_tokens="defer", policy=policy, stop_at_eos=False, block_length=4
    )
    output = decode(model, PROMPT, config)
    assert output.tokens[0].tolist() == [2, EOS, 3, EOS]
    assert set(output.unmask_step[0, [1, 3]].tolist()) == {0, 1}
    assert output.unmask_step[0, [2, 4]].tolist() == [2, 3]


def test_a_deferred_token_passes_no_threshold(scripted_model):
    model = scripted_model(saying([2, 5, 3, 4], [9.0, 9.0, 0.7, 9.0]))
    free = SamplingConfig(max_new_tokens=4, threshold=0.9)
    deferred = SamplingConfig(max_new_tokens=4, threshold=0.9, defer_tokens=(5,))
    assert decode(model, PROMPT, free).unmask_step.tolist() == [[-1, 0, 0, 1, 0]]
    assert decode(model, PROMPT, deferred).unmask_step.tolist() == [[-1, 0, 2, 1, 0]]


@pytest.mark.parametrize("field", ["suppress_tokens", "defer_tokens", "stop_tokens"])
def test_tokens_beyond_the_vocabulary_are_refused(mixing_model, field):
    config = SamplingConfig(max_new_tokens=4, **{field: (3, 10)})
    with pytest.raises(ConfigError, match=rf"sampling.{field}: id 10 .* use ids up to 9"):
        decode(mixing_model, PROMPT, config)


def test_an_end_behind_a_gap_ends_nothing():
    tokens = torch.tensor([[1, EOS, 2], [1, EOS, 2], [1, 2, 3]])
    is_filled = torch.tensor([[True, True, False], [False, True, True], [True, True, True]])
    assert has_ended(tokens, is_filled, (EOS,)).tolist() == [True, False, False]
    assert has_ended(tokens, is_filled, ()).tolist() == [False] * 3


def test_a_row_is_done_once_its_answer_is_found_complete(scripted_model):
    # Slot 2 first, then slots 0 and 1: the row is asked about when what stands without a gap grows.
    model = scripted_model(saying([2, 3, 4, 5], [3.0, 2.0, 9.0, 1.0]))
    asked = []

    def is_complete(row, tokens):
        asked.append((row, tokens))
        return 4 in tokens

    output = decode(model, PROMPT, SamplingConfig(max_new_tokens=4), is_complete=is_complete)
    assert asked == [(0, [2]), (0, [2, 3, 4])]
    assert output.num_forwards == len(model.calls) == 3
    assert output.tokens[0].tolist() == [2, 3, 4]
    assert output.canvas.tolist() == [[6, 2, 3, 4, MASK]]
    assert output.ended == [True]


def test_without_an_early_stop_nobody_is_asked(scripted_model):
    model = scripted_model(saying([2, 3, 4, 5], [2.0] * 4))
    config = SamplingConfig(max_new_tokens=4, stop_early=False)
    output = decode(model, PROMPT, config, is_complete=lambda row, tokens: 1 / 0)
    assert output.tokens[0].tolist() == [2, 3, 4, 5]
    assert output.ended == [False]


def test_an_end_of_text_token_goes_before_what_the_caller_reads(scripted_model):
    model = scripted_model(saying([2, EOS, 3, 4], [9.0, 8.0, 2.0, 1.0]))
    for stops_at_eos, expected in ((True, [2]), (False, [2, EOS, 3])):
        config = SamplingConfig(max_new_tokens=4, stop_at_eos=stops_at_eos)
        output = decode(model, PROMPT, config, is_complete=lambda row, tokens: 3 in tokens)
        assert output.tokens[0].tolist() == expected


@pytest.mark.parametrize("policy", ["low_confidence", "random", "independent"])
def test_complete_answers_begin_as_whole_ones_and_move_no_other_row(mixing_model, policy):
    prompts = [torch.tensor([token, 3]) for token in range(7)]
    config = SamplingConfig(max_new_tokens=8, block_length=4, policy=policy, stop_at_eos=False)
    whole = decode(mixing_model, prompts, config)
    early = decode(mixing_model, prompts, config, is_complete=lambda row, tokens: 4 in tokens)
    for row, (answer, longer) in enumerate(zip(early.tokens, whole.tokens, strict=True)):
        assert longer.tolist()[: len(answer)] == answer.tolist()
        assert early.ended[row] == (4 in longer.tolist()[: len(answer)])
        assert early.ended[row] or torch.equal(answer, longer)
    assert 0 < sum(early.ended) < len(prompts)
    assert sum(map(len, early.tokens)) < sum(map(len, whole.tokens))


def test_infilled_prompts_are_not_read(mixing_model):
    config = SamplingConfig(infill=True)
    with pytest.raises(UsageError, match="leave out is_complete"):
        decode(
            mixing_model, [torch.tensor([3, MASK])], config, is_complete=lambda row, tokens: True
        )


@pytest.mark.parametrize("editing", [{}, {"editing_threshold": 0.05, "max_editing_steps": 2}])
def test_block_decoding_reads_what_it_will_not_edit(build_model, editing):
    model = build_model("llada2").eval()
    prompts = [torch.arange(1, 8), torch.tensor([4]), torch.arange(20, 30)]
    config = SamplingConfig(
        max_new_tokens=12, block_length=4, decoder="block", threshold=0.1, stop_at_eos=False,
        **editing,
    )  # fmt: skip
    whole = [row.tolist() for row in decode(model, prompts, config).tokens]
    looked_at = []

    def is_complete(row, tokens):
        looked_at.append((row, tokens))
        return row != 1 and len(tokens) >= 3

    early = decode(model, prompts, config, is_complete=is_complete)
    assert all(whole[row][: len(tokens)] == tokens for row, tokens in looked_at)
    assert early.ended == [True, False, True]
    assert early.tokens[1].tolist() == whole[1]
    for row in (0, 2):
        answer = early.tokens[row].tolist()
        assert 3 <= len(answer) < 12
        assert answer == whole[row][: len(answer)]
