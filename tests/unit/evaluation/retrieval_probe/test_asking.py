"""The probe: what is asked in each condition, how answers are scored, and the figures from them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from memdlm.backbones.tiny import TinySizes, build_tiny
from memdlm.data.tasks import TaskConfig, generate_examples, score_text, vocabulary
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError, DataError
from memdlm.evaluation.retrieval_probe import asking
from memdlm.evaluation.retrieval_probe.asking import (
    CONDITIONS,
    ProbeItem,
    make_items,
    probe_batch,
    score_response,
)
from memdlm.evaluation.retrieval_probe.results import figures
from memdlm.evaluation.samples import Sample, encode_samples, read_samples
from memdlm.memory.config import MemoryConfig
from memdlm.sampling.config import SamplingConfig

SIZES = TinySizes(width=32, num_layers=2, num_heads=2, mlp_width=32, context_length=256, init_std=1)
STRONG = MemoryConfig(layer_fraction=0.5, learning_rate=1.0, prompt_mask_ratio=0.5, rank=4)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that knows every word of the generated tasks."""
    return build_word_tokenizer([], extra_words=vocabulary())


@pytest.fixture(scope="module")
def model(tokenizer) -> nn.Module:
    """A network with large random weights, so that all it sees matters."""
    return build_tiny("llada", tokenizer, 0, SIZES).eval()


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def items_of(tokenizer, samples: Sequence[Sample], **changes: object) -> list[ProbeItem]:
    encoded = encode_samples(samples, tokenizer, chat_template="never")
    settings = {"chat_template": "never", "needs_question": True, "seed": 0, **changes}
    return make_items(samples, encoded, tokenizer, **settings)


def test_the_needle_is_the_evidence_and_nothing_else(tokenizer) -> None:
    for task in ("single_needle", "variable_tracking", "common_words", "two_fact_story"):
        samples = read_samples(None, [f"generated_{task}@96"], 8, 0)
        for item in items_of(tokenizer, samples):
            text = tokenizer.decode(item.prompt[item.needle])
            told = tokenizer.decode(tokenizer(" ".join(item.sample.evidence)).input_ids)
            # Several pieces of evidence stand in the prompt in their own order.
            assert sorted(text.split()) == sorted(told.split())
            assert not item.needle[-len(item.question) :].any()
            assert item.prompt[-len(item.question) :].tolist() == item.question.tolist()
            assert tokenizer.decode(item.response[:-1]) == item.sample.dialogue.response


def test_scores_are_those_of_the_generated_tasks() -> None:
    config = TaskConfig(num_examples=20, split="test", seed=0)
    for name in config.tasks:
        samples = read_samples(None, [f"generated_{name}@96"], 4, 0)
        examples = generate_examples(
            TaskConfig(tasks=(name,), num_examples=4, split="test", seed=0)
        )
        for sample, example in zip(samples, examples, strict=True):
            right = example["completion"]
            reverse = " ".join(reversed(right.split()))
            cut = right.rsplit(" ", 1)[0]
            for text in (right, reverse, cut, "", f"{right} {right}", example["prompt"]):
                expected = score_text(example, text)
                assert score_response(sample, text) == (expected.exact, expected.recall)


def test_an_answer_is_a_word_and_not_a_part_of_one(tmp_path) -> None:
    rows = [{"prompt": "x", "completion": "in box 1", "answers": ["box 1", "in"]}]
    (sample,) = read_samples(str(write_rows(tmp_path / "rows.jsonl", rows)), [], None, 0)
    assert score_response(sample, "in  box 1 ") == (1.0, 1.0)
    assert score_response(sample, "It is in box 1.") == (0.0, 1.0)
    assert score_response(sample, "in box 12") == (0.0, 0.5)
    assert score_response(sample, "inside a box 1") == (0.0, 0.5)
    assert score_response(sample, "") == (0.0, 0.0)


def test_each_condition_asks_with_its_prompt_its_mask_and_the_memory_of_the_whole_prompt(
    tokenizer, model, monkeypatch
) -> None:
    items = items_of(tokenizer, read_samples(None, ["generated_single_needle@32"], 2, 0))
    asked = []
    real = asking.generate

    def spy(model: nn.Module, tokenizer: object, prompts: list, *arguments: object, **named):
        asked.append((getattr(model, "scope", None), prompts, named["memories"]))
        return real(model, tokenizer, prompts, *arguments, **named)

    monkeypatch.setattr(asking, "generate", spy)
    sampling = SamplingConfig(max_new_tokens=4)
    answered = probe_batch(model, tokenizer, items, list(CONDITIONS), sampling, STRONG)
    assert list(answered) == list(CONDITIONS)
    assert [scope for scope, _, _ in asked] == [None, "answer", "all", None]
    whole = [item.prompt.tolist() for item in items]
    for (_, prompts, memories), condition in zip(asked, CONDITIONS, strict=True):
        expected = [item.question.tolist() for item in items]
        if condition != "question_only":
            expected = whole
        assert [prompt.tolist() for prompt in prompts] == expected
        written = [memory.rows[0].prompts[0].num_tokens for memory in memories]
        assert written == [len(prompt) for prompt in whole]
    assert {answer.memory for row in answered.values() for answer in row} == {"kept"}
    plain = probe_batch(model, tokenizer, items, list(CONDITIONS), sampling, None)
    assert {answer.memory for row in plain.values() for answer in row} == {"off"}
    for condition in CONDITIONS:
        without, with_memory = plain[condition][0].nll, answered[condition][0].nll
        assert with_memory != pytest.approx(without, rel=1e-4)
    likelihoods = [plain[condition][0].nll for condition in CONDITIONS]
    assert len({round(nll, 4) for nll in likelihoods}) == 4


@pytest.mark.parametrize("memory", [None, STRONG])
def test_answers_do_not_depend_on_the_batch(tokenizer, model, memory) -> None:
    samples = read_samples(None, ["generated_single_needle@32"], 8, 0)
    samples += read_samples(None, ["generated_single_needle@48"], 8, 0)
    items = items_of(tokenizer, samples)
    sampling = SamplingConfig(max_new_tokens=4)

    def ask(size: int) -> dict[str, list]:
        parts = [
            probe_batch(model, tokenizer, items[i : i + size], list(CONDITIONS), sampling, memory)
            for i in range(0, 16, size)
        ]
        return {name: [a for part in parts for a in part[name]] for name in CONDITIONS}

    together, alone = ask(16), ask(1)
    for condition in CONDITIONS:
        for one, other in zip(together[condition], alone[condition], strict=True):
            assert one.response == other.response
            assert one.nll == pytest.approx(other.nll, rel=1e-3)


def test_changing_the_needle_changes_nothing_when_all_is_blocked(tokenizer, model) -> None:
    items = items_of(tokenizer, read_samples(None, ["generated_single_needle@32"], 3, 0))
    others = []
    for item in items:
        prompt = item.prompt.clone()
        prompt[item.needle] = prompt[item.needle].flip(0)
        assert not torch.equal(prompt, item.prompt)
        others.append(ProbeItem(item.sample, prompt, item.needle, None, item.response, item.seed))
    sampling, names = SamplingConfig(max_new_tokens=4), ["normal", "answer_blocked", "all_blocked"]
    before, after = (
        probe_batch(model, tokenizer, rows, names, sampling, None) for rows in (items, others)
    )
    assert after["all_blocked"] == before["all_blocked"]
    for leaky in ("normal", "answer_blocked"):
        assert after[leaky] != before[leaky]


def test_samples_that_cannot_be_probed_are_named(tokenizer, tmp_path) -> None:
    prompt = "amber keeps ba la fa . question : what does amber keep ?"

    def error(needs_question: bool = True, **row: object) -> str:
        rows = [{"prompt": prompt, "completion": "ba la fa", **row}]
        file = write_rows(tmp_path / "rows.jsonl", rows)
        with pytest.raises(DataError) as caught:
            items_of(tokenizer, read_samples(str(file), [], None, 0), needs_question=needs_question)
        return str(caught.value)

    assert "rows.jsonl:1 has no `evidence`: name the text" in error()
    assert "rows.jsonl:1 has no `question`" in error(evidence="amber keeps ba la fa .")
    missing = error(evidence=["amber keeps", "umber keeps"], question="where ?")
    assert "rows.jsonl:1, `evidence`: the prompt does not contain 'umber keeps'" in missing
    assert "`evidence` must be a text or a list of texts" in error(evidence=3)
    assert "`evidence` must be a text or a list of texts" in error(evidence=["ba", " "])
    assert "`question` must be a text" in error(evidence="ba", question=" ")
    assert "does not know 1 word(s)" in error(prompt=f"{prompt} what does Bob keep ?")
    # Without `question_only` nobody needs the question.
    rows = [{"prompt": prompt, "completion": "ba la fa", "evidence": "ba la fa"}]
    samples = read_samples(str(write_rows(tmp_path / "rows.jsonl", rows)), [], None, 0)
    (item,) = items_of(tokenizer, samples, needs_question=False)
    assert item.needle.nonzero().flatten().tolist() == [2, 3, 4]
    assert item.question is None


def test_an_unknown_condition_is_named(tokenizer, model) -> None:
    with pytest.raises(ConfigError, match="'blind' is not one of normal"):
        probe_batch(model, tokenizer, [], ["blind"], SamplingConfig(), None)


def records(*rows: tuple[float, float, float], sources: str = "") -> list[dict]:
    """Return samples with recalls (normal, cut, cut with memory); other metrics follow recall."""

    def answer(recall: float) -> dict:
        return {"exact": float(recall == 1), "recall": recall, "nll": 2 - recall}

    return [
        {
            "source": sources[i] if sources else "a",
            "answers": {
                "normal": {"none": answer(normal), "prompt": answer(normal)},
                "all_blocked": {"none": answer(cut), "prompt": answer(with_memory)},
            },
        }
        for i, (normal, cut, with_memory) in enumerate(rows)
    ]


def figure_of(found: dict, table: str, **key: str) -> dict:
    (entry,) = [e for e in found[table] if all(e[name] == key[name] for name in key)]
    return entry


def test_figures_are_means_differences_and_the_share_that_memory_gives_back() -> None:
    draws = {"num_resamples": 500, "seed": 0}
    names = ["normal", "all_blocked"]
    found = figures(records((1, 0, 0.5), (1, 0, 0), (1, 0.5, 0.5), (1, 0, 0.5)), names, **draws)
    key = {"condition": "all_blocked", "metric": "recall"}
    assert figure_of(found, "cells", memory="none", **key)["value"] == 0.125
    assert figure_of(found, "cells", memory="prompt", **key)["value"] == 0.375
    effect = figure_of(found, "memory_effects", **key)
    assert effect["difference"] == pytest.approx(0.25)
    assert 0 <= effect["low"] <= 0.25 <= effect["high"] <= 0.5
    assert (effect["num_better"], effect["num_worse"]) == (2, 0)
    # Better is less for the likelihood.
    nll = figure_of(found, "memory_effects", condition="all_blocked", metric="nll")
    assert nll["difference"] == pytest.approx(-0.25)
    assert (nll["num_better"], nll["num_worse"]) == (2, 0)
    share = figure_of(found, "recovered", **key)
    assert share["drop"] == pytest.approx(0.875)
    assert share["share"] == pytest.approx(0.25 / 0.875)
    assert share["low"] <= share["share"] <= share["high"]
    assert found == figures(
        records((1, 0, 0.5), (1, 0, 0), (1, 0.5, 0.5), (1, 0, 0.5)), names, **draws
    )


def test_nothing_can_be_given_back_where_nothing_was_lost() -> None:
    found = figures(
        records((1, 1, 1), (0, 0, 1), (1, 0, 0), (0, 1, 0)),
        ["normal", "all_blocked"],
        num_resamples=200,
        seed=0,
    )
    share = figure_of(found, "recovered", condition="all_blocked", metric="recall")
    assert share["drop"] == 0.0
    assert share["share"] is share["low"] is share["high"] is None


def test_tasks_count_the_same_whatever_their_number_of_samples() -> None:
    found = figures(
        records((1, 1, 1), (1, 0, 0), (1, 0, 0), sources="abb"),
        ["normal", "all_blocked"],
        num_resamples=50,
        seed=0,
    )
    cell = figure_of(found, "cells", condition="all_blocked", memory="none", metric="recall")
    assert cell["value"] == 0.5
