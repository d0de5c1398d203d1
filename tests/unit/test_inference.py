"""Inference: an answer is what its prompt gives alone, with its own memory, and leaves no trace."""

from dataclasses import replace

import pytest
import torch

from memdlm.backbones.tiny import TinySizes, build_tiny
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.inference import generate
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.config import SamplingConfig

TEXT = "ada keeps the red key in a box near the old mill and bo keeps a blue one there"
WORDS = TEXT.split()
PROMPTS = [" ".join(WORDS[:n]) for n in (4, 18, 9, 13)]
SAMPLING = SamplingConfig(max_new_tokens=8)
# One step at this rate moves the answers of an untrained network.
MEMORY = MemoryConfig(layer_fraction=0.5, learning_rate=5.0, rank=8)


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(WORDS)


@pytest.fixture(scope="module", params=["llada", "llada_moe"])
def model(request, tokenizer):
    sizes = TinySizes(width=32, num_layers=4, context_length=32, init_std=0.2)
    return build_tiny(request.param, tokenizer, seed=1, sizes=sizes)


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["off", "on"])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_a_batch_answers_as_each_prompt_alone(model, tokenizer, memory, guidance_scale) -> None:
    sampling = replace(SAMPLING, guidance_scale=guidance_scale, stop_at_eos=False)
    alone = [generate(model, tokenizer, [p], sampling, memory)[0] for p in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, sampling, memory, batch_size=4) == alone
    assert generate(model, tokenizer, PROMPTS, sampling, memory, batch_size=3) == alone
    assert {len(answer.token_ids) for answer in alone} == {8}


def test_the_memory_changes_answers_and_leaves_none_behind(model, tokenizer) -> None:
    without = generate(model, tokenizer, PROMPTS, SAMPLING)
    within = generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY)
    assert [a.memory for a in within] == ["written"] * len(PROMPTS)
    assert [a.token_ids for a in within] != [a.token_ids for a in without]
    assert generate(model, tokenizer, PROMPTS, SAMPLING) == without
    assert {a.memory for a in without} == {"off"}
    disabled = replace(MEMORY, enabled=False)
    assert generate(model, tokenizer, PROMPTS, SAMPLING, disabled) == without


def test_the_model_is_left_as_it_was(model, tokenizer) -> None:
    model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY)
    assert model.training
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_request_shares_a_memory_whatever_the_training_did(model, tokenizer) -> None:
    shared = replace(MEMORY, sharing="batch")
    expected = generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY)
    assert generate(model, tokenizer, PROMPTS, SAMPLING, shared) == expected


def test_the_memory_is_erased_when_decoding_fails(model, tokenizer, monkeypatch) -> None:
    erased = []
    erase = ParametricMemory.erase
    monkeypatch.setattr(ParametricMemory, "erase", lambda self: (erased.append(1), erase(self)))
    expected = generate(model, tokenizer, PROMPTS, SAMPLING)

    def fail(*args: object) -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr("memdlm.inference.decode", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY)
    assert erased == [1]
    assert generate(model, tokenizer, PROMPTS, SAMPLING) == expected


def test_a_memory_that_meets_inf_is_dropped_and_said_so(model, tokenizer) -> None:
    wild = replace(MEMORY, learning_rate=1e38, clip_norm=None, num_epochs=3)
    answers = generate(model, tokenizer, PROMPTS, SAMPLING, wild)
    assert "dropped" in {a.memory for a in answers}
    plain = generate(model, tokenizer, PROMPTS, SAMPLING)
    for answer, without in zip(answers, plain, strict=True):
        if answer.memory == "dropped":
            assert answer.token_ids == without.token_ids


def test_special_tokens_are_not_in_the_text(model, tokenizer) -> None:
    for answer in generate(model, tokenizer, PROMPTS, replace(SAMPLING, stop_at_eos=False)):
        assert "<|" not in answer.text
        kept = [i for i in answer.token_ids if i not in tokenizer.all_special_ids]
        assert answer.text == tokenizer.decode(kept)


def test_a_conversation_and_a_text_are_encoded_as_in_training(model, tokenizer) -> None:
    messages = [{"role": "user", "content": PROMPTS[0]}]
    spoken, text = generate(model, tokenizer, [messages, PROMPTS[0]], SAMPLING)
    assert spoken == text
    assert text.num_prompt_tokens == 4


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["ada", ""], "prompt 2 is empty"),
        (
            ["ada", " ".join(WORDS * 2)],
            "^prompt 2: .* exceeds the model's context of 32 tokens: shorten the prompt",
        ),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_before_any_is(
    model, tokenizer, prompts, message, monkeypatch
) -> None:
    monkeypatch.setattr("memdlm.inference.decode", None)
    with pytest.raises(DataError, match=message):
        generate(model, tokenizer, prompts, SAMPLING)


def test_a_prompt_outside_a_list_is_refused(model, tokenizer) -> None:
    with pytest.raises(UsageError, match=r"give a list of them, e.g. \[prompt\]"):
        generate(model, tokenizer, PROMPTS[0], SAMPLING)
    conversation = [{"role": "user", "content": PROMPTS[0]}]
    with pytest.raises(UsageError, match="prompt 1 is a dict; give a text or a list of messages"):
        generate(model, tokenizer, conversation, SAMPLING)


def test_a_scope_without_modules_and_an_empty_batch_are_refused(model, tokenizer) -> None:
    nowhere = MemoryConfig(scope="modules", modules=("no_such",))
    with pytest.raises(ConfigError, match="selects no module"):
        generate(model, tokenizer, PROMPTS, SAMPLING, nowhere)
    with pytest.raises(ConfigError, match="batch_size: 0"):
        generate(model, tokenizer, PROMPTS, SAMPLING, batch_size=0)
    assert generate(model, tokenizer, [], SAMPLING) == []
