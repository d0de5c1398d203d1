import math

import pytest
import torch

from memdlm.errors import ConfigError, NonFiniteError, UsageError
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.token_choice import row_draws

MASK, PAD, EOS, VOCABULARY = 9, 8, 7, 10
PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6, 1, 2, 2])]


def by_column(sureness):
    """Script: column c says token c % 7, with logit `sureness[c]` over a floor of 0."""

    def script(input_ids, attention_mask):
        batch, length = input_ids.shape
        logits = torch.zeros(batch, length, VOCABULARY)
        for column in range(length):
            logits[:, column, column % 7] = sureness[column]
        return logits

    return script


# --- order of unmasking, worked by hand -----------------------------------------------------------


def test_one_token_per_step_in_order_of_confidence(scripted_model):
    model = scripted_model(by_column([0, 0, 3.0, 1.0, 4.0, 2.0]))
    output = decode(model, [torch.tensor([6, 6])], SamplingConfig(max_new_tokens=4))
    assert output.unmask_step.tolist() == [[-1, -1, 1, 3, 0, 2]]
    assert output.canvas.tolist() == [[6, 6, 2, 3, 4, 5]]
    assert output.tokens[0].tolist() == [2, 3, 4, 5]
    assert output.num_forwards == len(model.calls) == 4


def test_two_blocks_of_two_steps(scripted_model):
    model = scripted_model(by_column([0, 1.0, 2.0, 5.0, 9.0, 6.0, 7.0]))
    config = SamplingConfig(max_new_tokens=6, block_length=3, num_unmasking_steps=4)
    output = decode(model, [torch.tensor([6])], config)
    assert output.unmask_step.tolist() == [[-1, 1, 0, 0, 2, 3, 2]]
    assert [call.positions.tolist() for call in model.calls] == [[[1, 2, 3]]] * 2 + [
        [[4, 5, 6]]
    ] * 2


def test_the_rest_of_the_canvas_is_what_the_model_sees(scripted_model):
    model = scripted_model(by_column([0, 1.0, 2.0, 3.0]))
    decode(model, [torch.tensor([6])], SamplingConfig(max_new_tokens=3))
    seen = [call.input_ids.tolist()[0] for call in model.calls]
    assert seen == [[6, MASK, MASK, MASK], [6, MASK, MASK, 3], [6, MASK, 2, 3]]
    assert all(call.attention_mask is None for call in model.calls)


def test_policies_differ_where_they_should(scripted_model):
    def script(input_ids, attention_mask):
        probabilities = torch.full((1, 3, VOCABULARY), 1e-9)
        probabilities[0, 1, :2] = torch.tensor([0.50, 0.49])  # sure, but of two tokens
        probabilities[0, 2, 0] = 0.45  # less sure, and of one
        probabilities[0, 2, 1:8] = 0.55 / 7
        return probabilities.log()

    steps = {}
    for policy in ("low_confidence", "margin", "entropy"):
        config = SamplingConfig(max_new_tokens=2, policy=policy)
        output = decode(scripted_model(script), [torch.tensor([6])], config)
        steps[policy] = output.unmask_step[0, 1:].tolist()
    assert steps == {"low_confidence": [0, 1], "margin": [1, 0], "entropy": [0, 1]}


def test_random_policy_follows_the_injected_draws(scripted_model):
    model = scripted_model(by_column([0, 9.0, 5.0, 1.0]))
    draws = {0: [0.1, 0.2, 0.9], 1: [0.3, 0.1, 0.95], 2: [0.5, 0.6, 0.7]}

    def draw(row, stream, step, shape):
        assert (row, stream, shape) == (0, "unmasking", (3,))
        return torch.tensor(draws[step])

    config = SamplingConfig(max_new_tokens=3, policy="random")
    output = decode(model, [torch.tensor([6])], config, draw=draw)
    assert output.unmask_step.tolist() == [[-1, 1, 2, 0]]


def test_steps_that_commit_nothing_are_not_run(scripted_model):
    model = scripted_model(by_column([0, 9.0, 5.0]))
    config = SamplingConfig(max_new_tokens=2, num_unmasking_steps=10)
    output = decode(model, [torch.tensor([6])], config)
    assert output.unmask_step.tolist() == [[-1, 0, 1]]
    assert output.num_forwards == len(model.calls) == 2


def test_a_threshold_commits_all_that_reach_it_and_at_least_one(scripted_model):
    # Probabilities of a token with logit x over nine zeros: e^x / (e^x + 9).
    model = scripted_model(by_column([0, 5.0, 1.0, 6.0, 2.0]))  # 0.943, 0.232, 0.978, 0.451
    config = SamplingConfig(max_new_tokens=4, threshold=0.9)
    output = decode(model, [torch.tensor([6])], config)
    assert output.unmask_step.tolist() == [[-1, 0, 2, 0, 1]]
    assert output.tokens_per_step == [[2, 1, 1]]
    assert output.num_forwards == len(model.calls) == 3
    both = SamplingConfig(max_new_tokens=4, threshold=0.9, num_unmasking_steps=2)
    assert decode(model, [torch.tensor([6])], both).unmask_step.tolist() == [[-1, 0, 1, 0, 1]]
    blocks = SamplingConfig(max_new_tokens=4, threshold=0.2, block_length=2)
    assert decode(model, [torch.tensor([6])], blocks).unmask_step.tolist() == [[-1, 0, 0, 1, 1]]


def test_a_short_last_block_gets_the_steps_of_a_whole_one(scripted_model):
    model = scripted_model(by_column([0, 1.0, 2.0, 3.0, 4.0, 5.0]))
    config = SamplingConfig(
        max_new_tokens=5, block_length=3, num_unmasking_steps=4, uneven_blocks=True
    )
    output = decode(model, [torch.tensor([6])], config)
    assert output.unmask_step.tolist() == [[-1, 1, 0, 0, 3, 2]]


def test_sampling_stays_among_the_likely_tokens_and_the_mask_token_takes_no_place(scripted_model):
    def script(input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[..., MASK], logits[..., 2], logits[..., 3] = 5.0, 2.0, 1.9
        return logits

    prompts = [torch.tensor([6])] * 20
    said = {}
    for name, settings in {"k": {"top_k": 2}, "p": {"top_p": 0.5}, "free": {}}.items():
        config = SamplingConfig(max_new_tokens=8, temperature=1.0, **settings)
        output = decode(scripted_model(script), prompts, config, draw=row_draws(range(20)))
        said[name] = set(torch.cat(output.tokens).tolist())
    assert said["k"] == said["p"] == {2, 3}
    assert said["free"] > {2, 3}
    one = SamplingConfig(max_new_tokens=8, temperature=1.0, top_k=1)
    assert set(decode(scripted_model(script), prompts[:1], one).tokens[0].tolist()) == {2}


def test_guidance_extrapolates_from_the_masked_prompt(scripted_model):
    def script(input_ids, attention_mask):
        logits = torch.zeros(1, 2, VOCABULARY)
        with_prompt = bool(input_ids[0, 0] == 6)
        # The prompt prefers token 1 by a little; without it, token 2 is preferred.
        logits[0, 1, 1] = 1.0 if with_prompt else 0.0
        logits[0, 1, 2] = 1.5 if with_prompt else 2.0
        return logits

    model = scripted_model(script)
    unguided = decode(model, [torch.tensor([6])], SamplingConfig(max_new_tokens=1))
    config = SamplingConfig(max_new_tokens=1, guidance_scale=1.0)
    guided = decode(model, [torch.tensor([6])], config)
    assert unguided.tokens[0].tolist() == [2]
    assert guided.tokens[0].tolist() == [1]  # 0 + 2 x 1.0 = 2 against 2 + 2 x (1.5 - 2) = 1
    assert (unguided.num_forwards, guided.num_forwards) == (1, 2)


# --- a row is what it is alone --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_unmasking_steps": 4},
        {"block_length": 4, "step_schedule": "cosine"},
        {"policy": "random"},
        {"policy": "margin", "temperature": 0.8},
        {"policy": "entropy", "guidance_scale": 0.5},
    ],
)
def test_every_row_of_a_batch_gives_the_tokens_it_gives_alone(mixing_model, settings):
    config = SamplingConfig(max_new_tokens=8, stop_at_eos=False, seed=3, **settings)
    batch = decode(mixing_model, PROMPTS, config)
    reversed_batch = decode(mixing_model, PROMPTS[::-1], config)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(mixing_model, [prompt], config)
        width = len(prompt) + 8
        assert torch.equal(batch.tokens[row], alone.tokens[0])
        assert torch.equal(batch.unmask_step[row, :width], alone.unmask_step[0])
        assert torch.equal(reversed_batch.tokens[-1 - row], alone.tokens[0])


def test_the_seed_decides_and_nothing_else_is_drawn(mixing_model):
    config = SamplingConfig(max_new_tokens=8, temperature=1.0, policy="random", seed=1)
    state = torch.get_rng_state()
    first, again = (decode(mixing_model, PROMPTS, config) for _ in range(2))
    assert torch.equal(first.canvas, again.canvas)
    assert torch.equal(first.unmask_step, again.unmask_step)
    assert torch.equal(state, torch.get_rng_state())
    other = decode(
        mixing_model,
        PROMPTS,
        SamplingConfig(max_new_tokens=8, temperature=1.0, policy="random", seed=2),
    )
    assert not torch.equal(first.unmask_step, other.unmask_step)


def test_one_seed_per_row(mixing_model):
    config = SamplingConfig(max_new_tokens=8, temperature=1.0, stop_at_eos=False)
    twins = decode(mixing_model, [PROMPTS[0]] * 2, config, draw=row_draws([4, 5]))
    alone = decode(mixing_model, [PROMPTS[0]], config, draw=row_draws([5]))
    assert not torch.equal(twins.tokens[0], twins.tokens[1])
    assert torch.equal(twins.tokens[1], alone.tokens[0])


# --- manners --------------------------------------------------------------------------------------


def test_runs_in_evaluation_mode_and_restores_every_submodule(scripted_model):
    model = scripted_model(by_column([0, 1.0]))
    model.train()
    model.dropout.eval()
    decode(model, [torch.tensor([6])], SamplingConfig(max_new_tokens=1))
    assert (model.training, model.dropout.training) == (True, False)
    assert [(call.training, call.has_grad) for call in model.calls] == [(False, False)]
    assert torch.is_grad_enabled()


def test_the_mode_is_restored_after_an_error(scripted_model):
    model = scripted_model(lambda ids, mask: torch.full((*ids.shape, VOCABULARY), math.nan)).train()
    with pytest.raises(NonFiniteError, match="nan"):
        decode(model, [torch.tensor([6])], SamplingConfig(max_new_tokens=2))
    assert model.training


def test_on_step_sees_every_state(mixing_model):
    steps = []
    config = SamplingConfig(max_new_tokens=4, num_unmasking_steps=2)
    output = decode(mixing_model, PROMPTS, config, on_step=steps.append)
    assert [(step.index, step.num_steps) for step in steps] == [(0, 2), (1, 2)]
    assert output.tokens_per_step == [[2, 2]] * 3
    for step in steps:
        assert torch.equal(step.committed, output.unmask_step == step.index)
        assert (step.canvas == MASK).sum() == 3 * 2 * (1 - step.index)
    assert torch.equal(steps[-1].canvas, output.canvas)


def test_text_ends_before_the_first_end_of_text_token(scripted_model):
    def script(input_ids, attention_mask):
        logits = torch.zeros(1, 5, VOCABULARY)
        for column, token in enumerate([0, 3, EOS, 4, EOS]):
            logits[0, column, token] = 5.0
        return logits

    prompt = [torch.tensor([6])]
    cut = decode(scripted_model(script), prompt, SamplingConfig(max_new_tokens=4, stop_early=False))
    assert cut.tokens[0].tolist() == [3]
    assert cut.canvas.tolist() == [[6, 3, EOS, 4, EOS]]
    assert cut.ended == [True]
    whole = decode(
        scripted_model(script), prompt, SamplingConfig(max_new_tokens=4, stop_at_eos=False)
    )
    assert whole.tokens[0].tolist() == [3, EOS, 4, EOS]
    several = scripted_model(script)
    several.config.eos_token_id = [EOS, 3]
    assert decode(several, prompt, SamplingConfig(max_new_tokens=4)).tokens[0].tolist() == []


def test_suppressed_tokens_are_never_generated(mixing_model):
    config = SamplingConfig(max_new_tokens=8, suppress_tokens=(0, 1, 2, 3, 4, EOS), temperature=1.0)
    output = decode(mixing_model, PROMPTS, config)
    assert set(torch.cat(output.tokens).tolist()) <= {5, 6, 8}


# --- bad input ------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_context_names_the_fix(mixing_model):
    with pytest.raises(
        UsageError, match=r"prompt 1 has 13 tokens.*context of 16; cut the prompt to 12"
    ):
        decode(
            mixing_model,
            [torch.tensor([1]), torch.ones(13, dtype=torch.int64)],
            SamplingConfig(max_new_tokens=4),
        )
    with pytest.raises(UsageError, match="context of 16; lower max_new_tokens"):
        decode(mixing_model, [torch.tensor([1])], SamplingConfig(max_new_tokens=16))


def test_infilling_asks_for_a_mask_token_and_a_prompt_that_fits(mixing_model):
    config = SamplingConfig(infill=True)
    with pytest.raises(UsageError, match=r"prompt 1 holds no mask token \(id 9\)"):
        decode(mixing_model, [torch.tensor([1, MASK]), torch.tensor([1, 2])], config)
    with pytest.raises(
        UsageError, match=r"17 tokens, which exceeds .* of 16; cut the prompt to 16"
    ):
        decode(mixing_model, [torch.full((17,), MASK)], config)
    assert decode(mixing_model, [torch.full((16,), MASK)], config).canvas.shape == (1, 16)


def test_logits_beyond_float_are_refused(scripted_model):
    model = scripted_model(lambda ids, mask: torch.full((*ids.shape, VOCABULARY), math.inf))
    with pytest.raises(NonFiniteError, match="inf"):
        decode(model, [torch.tensor([6])], SamplingConfig(max_new_tokens=2))


def test_a_full_context_still_decodes(mixing_model):
    output = decode(
        mixing_model, [torch.ones(12, dtype=torch.int64)], SamplingConfig(max_new_tokens=4)
    )
    assert output.canvas.shape == (1, 16)


@pytest.mark.parametrize("name", ["mask_token_id", "pad_token_id", "eos_token_id"])
def test_a_model_without_a_needed_token_is_refused(mixing_model, name):
    setattr(mixing_model.config, name, None)
    with pytest.raises(ConfigError, match=f"no {name}"):
        decode(mixing_model, PROMPTS, SamplingConfig(max_new_tokens=4))


def test_a_suppressed_token_beyond_the_vocabulary_is_refused(mixing_model):
    config = SamplingConfig(max_new_tokens=4, suppress_tokens=(10,))
    with pytest.raises(ConfigError, match=r"id 10 .* vocabulary of 10; use ids up to 9"):
        decode(mixing_model, PROMPTS, config)
