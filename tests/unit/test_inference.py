"""Inference: an answer is what its prompt gives alone, with its own memory, and leaves no trace."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from memdlm.backbones.tiny import TinySizes, build_tiny
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.inference import generate
from memdlm.memory.budget import COPIES_WHILE_WRITING, memory_bytes
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.memory.placement import place
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


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["off", "on"])
def test_stop_strings_end_answers_where_they_would_be_cut(model, tokenizer, memory) -> None:
    sampling = replace(SAMPLING, stop_at_eos=False, block_length=2)
    whole = generate(model, tokenizer, PROMPTS, sampling, memory, batch_size=4)
    stops = [answer.text.split()[3] for answer in whole[:2]]
    expected = [min(answer.text.partition(stop)[0] for stop in stops) for answer in whole]
    for watched in (None, lambda update: None):
        found = generate(
            model, tokenizer, PROMPTS, sampling, memory, batch_size=4, stop_strings=stops,
            on_update=watched,
        )  # fmt: skip
        assert [answer.text for answer in found] == expected
        for answer, longer in zip(found, whole, strict=True):
            assert longer.token_ids[: len(answer.token_ids)] == answer.token_ids
            assert (len(answer.token_ids) < 8) == (answer.text != longer.text)
        assert sum(len(answer.token_ids) < 8 for answer in found) >= 2
    late = replace(sampling, stop_early=False)
    cut = generate(model, tokenizer, PROMPTS, late, memory, batch_size=4, stop_strings=stops)
    assert [answer.text for answer in cut] == expected
    assert [answer.token_ids for answer in cut] == [answer.token_ids for answer in whole]


def test_bad_stop_strings_are_refused(model, tokenizer) -> None:
    with pytest.raises(UsageError, match="no empty string"):
        generate(model, tokenizer, PROMPTS, SAMPLING, stop_strings=[""])


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

    def fail(*args: object, **kwargs: object) -> None:
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


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["off", "on"])
def test_seeds_per_prompt_decide_what_each_samples_wherever_it_stands(
    model, tokenizer, memory
) -> None:
    sampling = replace(SAMPLING, temperature=1.0, stop_at_eos=False)
    prompts, seeds = [PROMPTS[1]] * 3 + [PROMPTS[0]], [5, 6, 5, 5]

    def answer(order: list[int], batch_size: int) -> list[tuple[int, ...]]:
        given = [prompts[i] for i in order]
        draws = [seeds[i] for i in order]
        answers = generate(
            model, tokenizer, given, sampling, memory, sampling_seeds=draws, batch_size=batch_size
        )
        return [a.token_ids for a in answers]

    together = answer([0, 1, 2, 3], 4)
    assert together[0] == together[2] != together[1]
    assert answer([3, 1, 0, 2], 2) == [together[i] for i in (3, 1, 0, 2)]
    assert answer([1], 1) == [together[1]]
    alike = [replace(sampling, seed=6)]
    assert [a.token_ids for a in generate(model, tokenizer, prompts[:1], *alike, memory)] == [
        together[1]
    ]
    with pytest.raises(UsageError, match="sampling_seeds: 1 for 4 prompts"):
        generate(model, tokenizer, prompts, sampling, sampling_seeds=[1])


def test_token_ids_are_answered_like_the_text_they_stand_for(model, tokenizer) -> None:
    ids = [torch.tensor(tokenizer(p)["input_ids"]) for p in PROMPTS]
    assert generate(model, tokenizer, ids, SAMPLING, MEMORY) == generate(
        model, tokenizer, PROMPTS, SAMPLING, MEMORY
    )
    with pytest.raises(DataError, match="prompt 1 is empty"):
        generate(model, tokenizer, [ids[0][:0]], SAMPLING)


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


def kept_memories(model, tokenizer, prompts, **changes):
    """Return one memory per prompt, as `generate` writes them."""
    memories = []
    for prompt in prompts:
        memory = ParametricMemory(model, replace(MEMORY, **changes))
        memory.write(tokenizer(prompt, return_tensors="pt")["input_ids"])
        memories.append(memory)
    return memories


def test_kept_memories_answer_as_those_written_from_the_prompt(model, tokenizer) -> None:
    expected = generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY)
    memories = kept_memories(model, tokenizer, PROMPTS)
    given = generate(model, tokenizer, PROMPTS, SAMPLING, memories=memories, batch_size=3)
    assert [a.token_ids for a in given] == [a.token_ids for a in expected]
    assert {a.memory for a in given} == {"kept"}
    assert all(memory.is_written for memory in memories)  # not erased: they are the caller's
    some = generate(model, tokenizer, PROMPTS, SAMPLING, memories=[None, memories[1], None, None])
    plain = generate(model, tokenizer, PROMPTS, SAMPLING)
    assert some[1] == given[1]
    assert [some[0], *some[2:]] == [plain[0], *plain[2:]]


def test_a_seed_per_prompt_decides_that_prompts_memory(model, tokenizer) -> None:
    seeds = [3, 0, 3, 1]
    together = generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY, seed=seeds)
    for prompt, seed, answer in zip(PROMPTS, seeds, together, strict=True):
        assert generate(model, tokenizer, [prompt], SAMPLING, MEMORY, seed=seed) == [answer]


def test_batches_keep_to_the_budget(model, tokenizer, monkeypatch) -> None:
    expected = generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY)
    one = memory_bytes(place(model.model, MEMORY), MEMORY)
    budget = COPIES_WHILE_WRITING * one * 5 // 2  # room for two
    most = []
    write = ParametricMemory.write

    def watch(self, *args, **kwargs):
        stats = write(self, *args, **kwargs)
        most.append(COPIES_WHILE_WRITING * self.num_bytes)
        return stats

    monkeypatch.setattr(ParametricMemory, "write", watch)
    options = {"max_memory_bytes": budget}
    assert generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY, **options) == expected
    assert len(most) == 2 and max(most) <= budget
    with pytest.raises(ConfigError, match="max_memory_bytes: one memory needs"):
        generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY, max_memory_bytes=one)
    assert generate(model, tokenizer, PROMPTS, SAMPLING, max_memory_bytes=1)[0].memory == "off"


def test_memories_that_do_not_fit_are_refused_before_any_prompt_is_decoded(
    model, tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr("memdlm.inference.decode", None)
    first, second = kept_memories(model, tokenizer, PROMPTS[:2])
    (other,) = kept_memories(model, tokenizer, PROMPTS[:1], rank=3)
    pair = ParametricMemory.stack([first, second])
    empty = ParametricMemory(model, MEMORY)
    for memories, message in (
        ([first], "memories: 1 for 2 prompts"),
        ([first, other], "memories of one batch must have one rank"),
        ([first, pair], "memory 2 has 2 rows; give one with a single row"),
        ([first, empty], "memory 2 has 0 rows"),
    ):
        with pytest.raises(UsageError, match=message):
            generate(model, tokenizer, PROMPTS[:2], SAMPLING, memories=memories)
    with pytest.raises(UsageError, match="or memories to use, not both"):
        generate(model, tokenizer, PROMPTS[:1], SAMPLING, MEMORY, memories=[first])
    with pytest.raises(UsageError, match="seed: 2 for 1 prompts"):
        generate(model, tokenizer, PROMPTS[:1], SAMPLING, MEMORY, seed=[1, 2])
    alien = build_tiny("llada", tokenizer, sizes=TinySizes(width=16, num_layers=2))
    with pytest.raises(UsageError, match="memory 1 belongs to another model"):
        generate(alien, tokenizer, PROMPTS[:1], SAMPLING, memories=[first])


def test_a_hundred_requests_in_random_batches_see_only_their_own(model, tokenizer) -> None:
    """No answer and no memory depends on what else is in a batch, and no weight changes."""
    order = random.Random(0)
    prompts = [" ".join(order.choices(WORDS, k=order.randint(2, 16))) for _ in range(100)]
    # Half answer from memories of other texts, kept or none; half write their own.
    documents = [" ".join(order.choices(WORDS, k=order.randint(2, 30))) for _ in range(50)]
    memories = [
        None if i % 5 == 0 else m for i, m in enumerate(kept_memories(model, tokenizer, documents))
    ]
    sampling = replace(SAMPLING, max_new_tokens=4, stop_at_eos=False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = [m and {n: t.clone() for n, t in m.fast_weights.tensors.items()} for m in memories]
    written = [generate(model, tokenizer, [p], sampling, MEMORY)[0] for p in prompts[:50]]
    kept = [
        generate(model, tokenizer, [p], sampling, memories=[m])[0]
        for p, m in zip(prompts[50:], memories, strict=True)
    ]
    for size in (7, 32):
        shuffled = order.sample(range(50), 50)
        some = [prompts[i] for i in shuffled]
        given = generate(model, tokenizer, some, sampling, MEMORY, batch_size=size)
        assert given == [written[i] for i in shuffled]
        some, theirs = [prompts[50 + i] for i in shuffled], [memories[i] for i in shuffled]
        given = generate(model, tokenizer, some, sampling, memories=theirs, batch_size=size)
        assert given == [kept[i] for i in shuffled]
    assert len({answer.token_ids for answer in written + kept}) > 20
    for memory, tensors in zip(memories, before, strict=True):
        if memory is not None:
            for name, tensor in memory.fast_weights.tensors.items():
                assert torch.equal(tensor, tensors[name])
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())


def test_threads_that_share_a_model_get_the_answers_they_get_alone(model, tokenizer) -> None:
    configs = [None, MEMORY, replace(MEMORY, learning_rate=2.0), None, MEMORY, MEMORY]
    expected = [
        generate(model, tokenizer, PROMPTS, SAMPLING, c, seed=i) for i, c in enumerate(configs)
    ]
    assert len({tuple(a.token_ids for a in answers) for answers in expected}) > 2
    start = threading.Barrier(len(configs))

    def run(number: int):
        start.wait()
        return generate(
            model, tokenizer, PROMPTS, SAMPLING, configs[number], seed=number, batch_size=2
        )

    with ThreadPoolExecutor(len(configs)) as pool:
        given = list(pool.map(run, range(len(configs))))
    assert given == expected


def test_every_step_is_told_and_costs_are_counted(model, tokenizer) -> None:
    sampling = replace(SAMPLING, stop_at_eos=False, num_unmasking_steps=4)
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    seen = []

    def on_update(update) -> None:
        seen.append((update.rows, update.step.index))
        for row, tokens in zip(update.rows, update.new_tokens, strict=True):
            streamed[row] += tokens
        assert update.answer_starts == tuple(len(PROMPTS[row].split()) for row in update.rows)

    told = generate(model, tokenizer, PROMPTS, sampling, MEMORY, batch_size=3, on_update=on_update)
    assert told == generate(model, tokenizer, PROMPTS, sampling, MEMORY)
    assert streamed == [list(answer.token_ids) for answer in told]
    assert seen == [(rows, i) for rows in (range(3), range(3, 4)) for i in range(4)]
    assert [a.tokens_per_step for a in told] == [(2, 2, 2, 2)] * 4
    assert [a.batch.num_prompts for a in told] == [3, 3, 3, 1]
    assert [a.batch.num_new_tokens for a in told] == [24, 24, 24, 8]
    assert {a.batch.num_forwards for a in told} == {4}
    assert all(a.batch.memory_seconds > 0 and a.batch.decode_seconds > 0 for a in told)


def test_stopping_within_a_step_forgets_the_memory_and_frees_the_model(model, tokenizer) -> None:
    expected = generate(model, tokenizer, PROMPTS, SAMPLING)

    def stop(update) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPTS, SAMPLING, MEMORY, on_update=stop)
    assert generate(model, tokenizer, PROMPTS, SAMPLING) == expected
