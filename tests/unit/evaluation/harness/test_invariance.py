"""An answer is what its request gives alone: whatever the batch, the order, or the call."""

import random
from dataclasses import replace

import pytest
import torch

from memdlm.evaluation.harness.likelihood import LikelihoodConfig
from memdlm.evaluation.harness.model import DiffusionLM
from memdlm.inference import generate
from memdlm.memory.budget import COPIES_WHILE_WRITING, memory_bytes
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.config import SamplingConfig
from tests.unit.evaluation.harness.asking import (
    MEMORY,
    PROMPTS,
    QUESTIONS,
    ask,
    build_lm,
    build_model,
    build_tokenizer,
    choose,
)

FEW = LikelihoodConfig(num_samples=8)


@pytest.fixture(scope="module", params=["off", "on"])
def memory(request):
    return MEMORY if request.param == "on" else None


def test_a_batch_of_one_and_of_sixteen_give_the_same_answers(family, memory) -> None:
    model, tokenizer = build_model(family), build_tokenizer()
    requests = ask(PROMPTS + PROMPTS[:2])
    alone = DiffusionLM(model, tokenizer, memory=memory, batch_size=1).answer(requests)
    together = DiffusionLM(model, tokenizer, memory=memory, batch_size=16).answer(requests)
    assert together == alone
    assert {record.memory for record in alone} == {"off" if memory is None else "written"}
    assert len({record.response for record in alone}) > 3


def test_likelihoods_do_not_depend_on_the_batch(family, memory) -> None:
    model, tokenizer = build_model(family), build_tokenizer()
    requests = choose(QUESTIONS)
    rows = [replace(FEW, batch_size=size) for size in (1, 7)]
    alone, together = (
        DiffusionLM(model, tokenizer, memory=memory, batch_size=size, likelihood=row).answer(
            requests
        )
        for size, row in zip((1, 16), rows, strict=True)
    )
    for one, other in zip(alone, together, strict=True):
        assert other.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-4)
        assert other.standard_error == pytest.approx(one.standard_error, abs=1e-4)
        assert other.is_greedy is one.is_greedy
        assert other.memory == one.memory == ("off" if memory is None else "written")


def test_order_and_company_change_nothing(memory) -> None:
    lm = build_lm(memory=memory, sampling=SamplingConfig(temperature=1.0), batch_size=4)
    requests = ask(PROMPTS)
    expected = dict(zip(PROMPTS, lm.generate_until(requests), strict=True))
    shuffled = random.Random(0).sample(PROMPTS, len(PROMPTS))
    assert lm.generate_until(ask(shuffled)) == [expected[prompt] for prompt in shuffled]
    assert lm.generate_until(ask(PROMPTS[3:5])) == [expected[p] for p in PROMPTS[3:5]]


def test_repeats_of_a_request_draw_apart_and_in_the_same_way_each_time() -> None:
    lm = build_lm(sampling=SamplingConfig(temperature=2.0), batch_size=4)
    (request,) = ask(PROMPTS[:1])
    answers = lm.generate_until([request] * 5)
    assert len(set(answers)) > 1
    assert lm.generate_until([request] * 3) == answers[:3]
    assert lm.generate_until([*ask(PROMPTS[1:]), *[request] * 5])[-5:] == answers


def test_the_seed_decides_memories_samples_and_masks() -> None:
    def answers(**settings) -> list:
        lm = build_lm(batch_size=4, likelihood=FEW, **settings)
        long = [record.log_likelihood for record in lm.answer(choose(QUESTIONS))[2::3]]
        return [lm.generate_until(ask(PROMPTS)), long]

    sampling = SamplingConfig(temperature=1.0)
    for settings in ({"sampling": sampling}, {"memory": MEMORY}):
        first, again, other = (answers(seed=seed, **settings) for seed in (0, 0, 1))
        assert first == again
        assert first[0] != other[0]
        assert first[1] != other[1]
    reseeded = answers(sampling=replace(sampling, seed=1))
    assert reseeded[0] != answers(sampling=sampling)[0]


def test_greedy_answers_are_those_of_generate() -> None:
    model, tokenizer = build_model(), build_tokenizer()
    lm = DiffusionLM(model, tokenizer, batch_size=4)
    direct = generate(
        model, tokenizer, PROMPTS, SamplingConfig(max_new_tokens=6), chat_template="never"
    )
    records = lm.answer(ask(PROMPTS))
    assert [record.response for record in records] == [answer.text for answer in direct]
    assert [r.num_new_tokens for r in records] == [len(a.token_ids) for a in direct]
    assert [r.num_prompt_tokens for r in records] == [a.num_prompt_tokens for a in direct]


def test_a_memory_is_written_from_the_context_alone_and_shared_by_its_continuations(
    monkeypatch,
) -> None:
    written = []
    write = ParametricMemory.write

    def watch(self, input_ids: torch.Tensor, attention_mask=None, **keywords):
        written.append((tuple(input_ids.shape), tuple(keywords["seed"])))
        return write(self, input_ids, attention_mask, **keywords)

    monkeypatch.setattr(ParametricMemory, "write", watch)
    lm = build_lm(memory=MEMORY, likelihood=FEW, batch_size=16)
    lm.answer(choose(QUESTIONS))
    assert [shape for shape, _ in written] == [(3, 20)]
    ((_, seeds),) = written
    expected = lm.answer(choose([QUESTIONS[1]]))
    assert written[1] == ((1, 20), (seeds[0],))
    placement = ParametricMemory(lm.subject.model, MEMORY).placement
    room = COPIES_WHILE_WRITING * memory_bytes(placement, MEMORY)
    small = build_lm(memory=MEMORY, likelihood=FEW, batch_size=16, max_memory_bytes=room)
    found = small.answer(choose(QUESTIONS))
    assert [shape[0] for shape, _ in written[2:]] == [1, 1, 1]
    for one, other in zip(found[3:6], expected, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
