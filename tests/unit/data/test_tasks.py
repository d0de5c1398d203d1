"""Every generated task keeps the same promises; the splits share no value."""

import hashlib
import random
from dataclasses import replace

import pytest

from memdlm.data.tasks import TASKS, TaskConfig, chance_level, generate_examples, score_text
from memdlm.data.tasks.config import Example
from memdlm.data.tasks.story import draw_names
from memdlm.data.tasks.words import NAMES, SHORTEST_FILLER, draw_values, vocabulary
from memdlm.errors import ConfigError

EVERY_TASK = sorted(TASKS)


def examples_of(task: str, **settings: object) -> list[Example]:
    return generate_examples(replace(TaskConfig(tasks=(task,), num_examples=40), **settings))


def num_words(example: Example) -> int:
    return len(f"{example['prompt']} {example['completion']}".split())


@pytest.mark.parametrize("length", [96, 192, 384, 1000])
@pytest.mark.parametrize("task", EVERY_TASK)
def test_length_is_met(task: str, length: int) -> None:
    for example in examples_of(task, length=length, num_examples=10):
        assert length - SHORTEST_FILLER < num_words(example) <= length


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", EVERY_TASK)
def test_answers_stand_in_the_context(task: str, split: str) -> None:
    for example in examples_of(task, split=split):
        for answer in example["answers"]:
            assert f" {answer} " in f" {example['prompt']} "
            assert answer in example["completion"]
        for candidate in example["candidates"]:
            assert f" {candidate} ." in example["prompt"]
        assert len(set(example["candidates"])) == len(example["candidates"]) > 1
        assert set(example["answers"]) & set(example["candidates"])


@pytest.mark.parametrize("task", EVERY_TASK)
def test_same_settings_same_examples(task: str) -> None:
    assert examples_of(task) == examples_of(task)
    assert examples_of(task, num_examples=5) == examples_of(task)[:5]
    assert examples_of(task, seed=1) != examples_of(task)


@pytest.mark.parametrize("task", EVERY_TASK)
def test_splits_share_no_value(task: str) -> None:
    train = {v for e in examples_of(task, num_examples=200) for v in e["candidates"]}
    test = {v for e in examples_of(task, num_examples=200, split="test") for v in e["candidates"]}
    assert train and test and not train & test


def test_every_value_token_occurs_in_both_splits() -> None:
    words = [
        {word for value in draw_values(random.Random(0), split, 500) for word in value.split()}
        for split in ("train", "test")
    ]
    assert words[0] == words[1]


@pytest.mark.parametrize("task", EVERY_TASK)
def test_vocabulary_is_closed(task: str) -> None:
    known = list(vocabulary())
    assert len(set(known)) == len(known)
    for split in ("train", "test"):
        for example in examples_of(task, split=split, num_examples=100):
            assert set(f"{example['prompt']} {example['completion']}".split()) <= set(known)


@pytest.mark.parametrize("task", EVERY_TASK)
def test_answer_is_in_no_fixed_place(task: str) -> None:
    places = {
        round(e["prompt"].rindex(e["answers"][-1]) / len(e["prompt"]), 1)
        for e in examples_of(task, length=192)
    }
    assert len(places) >= 5


@pytest.mark.parametrize("task", EVERY_TASK)
def test_score_of_right_wrong_and_partial_answers(task: str) -> None:
    for example in examples_of(task):
        assert score_text(example, example["completion"]).exact
        assert score_text(example, example["completion"]).recall == 1.0
        cut = " ".join(example["completion"].split()[:-1])
        assert not score_text(example, cut).exact
        assert score_text(example, cut).recall < 1.0
        assert score_text(example, "").recall == 0.0
        assert 0.0 < chance_level(example) <= 0.5


def test_only_the_multi_value_answer_may_be_reordered() -> None:
    example = examples_of("multi_value_needle")[0]
    first, second = example["answers"]
    swapped = example["completion"].replace(first, "_").replace(second, first).replace("_", second)
    assert score_text(example, swapped).exact
    story = examples_of("two_fact_story")[0]
    assert not score_text(story, " ".join(reversed(story["completion"].split()))).exact


def test_answers_follow_from_the_facts() -> None:
    for example in examples_of("single_needle"):
        asked = example["prompt"].split()[-2]
        assert any(
            f" {asked} {verb} {example['answers'][0]} ." in f" {example['prompt']}"
            for verb in ("keeps", "guards", "hides")
        )
    for example in examples_of("multi_value_needle", num_values=3, length=192):
        asked = example["prompt"].split()[-2]
        added = [f"{asked} adds {value} ." in example["prompt"] for value in example["answers"]]
        assert added == [False, True, True]
    for example in examples_of("variable_tracking", num_hops=4):
        name = example["prompt"].split()[-2]
        for following in example["answers"][:-1]:
            assert f"{name} copies {following} ." in example["prompt"]
            name = following
        assert f"{name} keeps {example['answers'][-1]} ." in example["prompt"]
    for example in examples_of("two_fact_story", num_moves=3, length=192):
        person, place = example["answers"]
        thing = example["prompt"].split()[-2]
        assert f"{thing} joined {person} ." in example["prompt"]
        last_move = example["prompt"].rindex(f"{person} entered")
        assert example["prompt"][last_move:].startswith(f"{person} entered {place} .")
    for example in examples_of("common_words"):
        counts = {v: example["prompt"].count(f"note : {v} .") for v in example["candidates"]}
        assert counts.pop(example["answers"][0]) == 4
        assert set(counts.values()) == {1}


@pytest.mark.parametrize("task", EVERY_TASK)
def test_evidence_is_what_the_answer_follows_from(task: str) -> None:
    for example in examples_of(task, num_hops=4, num_moves=3, num_values=3, length=192):
        prompt, question = example["prompt"], example["question"]
        assert prompt.endswith(f" {question}")
        told = [prompt[start:end] for start, end in example["evidence"]]
        assert all(sentence.endswith(" .") and sentence.count(".") == 1 for sentence in told)
        assert example["evidence"] == sorted(set(example["evidence"]))
        if task == "common_words":
            assert told == [f"note : {example['answers'][0]} ."] * 4
            continue
        # What the question and the sentences name leads to every answer, and to nothing else.
        known = {question.split()[-2]}
        for _ in told:
            known |= {word for s in told if s.split()[0] in known for word in s.split()[1:]}
        assert all(sentence.split()[0] in known for sentence in told)
        assert all(set(answer.split()) <= known for answer in example["answers"])
        # Without them, no answer stands anywhere in the document.
        rest = prompt.removesuffix(question)
        for sentence in told:
            rest = rest.replace(sentence, "")
        assert not any(f" {answer} ." in rest for answer in example["answers"])


# Of prompts, completions, answers and candidates; recorded before examples told their evidence.
TEXTS = {
    ("train", 1): "94d2afe1931b5e43b54df8cf4ebbf44a",
    ("train", 2): "ac2612796de6eafc24912d70b065dff8",
    ("test", 1): "e6a40df6aa68f4f6b515cb4d28d222d7",
    ("test", 2): "a56e4ee450acbf1bae986c3f016417c1",
}


@pytest.mark.parametrize(("split", "num_moves"), TEXTS)
def test_texts_are_the_recorded_ones(split: str, num_moves: int) -> None:
    hops = {1: 3, 2: 1}[num_moves]
    digest = hashlib.blake2b(digest_size=16)
    for length in (96, 384):
        for example in generate_examples(
            TaskConfig(
                length=length,
                num_examples=400,
                seed=3,
                split=split,
                shortest_length=90,
                num_moves=num_moves,
                num_hops=hops,
            )
        ):
            for key in ("prompt", "completion", "task", "answers", "candidates"):
                digest.update(repr(example[key]).encode())
    assert digest.hexdigest() == TEXTS[split, num_moves]


def test_varied_lengths_and_shared_turns() -> None:
    examples = generate_examples(TaskConfig(num_examples=100, length=192, shortest_length=96))
    assert {e["task"] for e in examples} == set(TASKS)
    sizes = [num_words(e) for e in examples]
    assert min(sizes) < 115 and max(sizes) > 170


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"split": "dev"}, "split"),
        ({"tasks": ()}, "task"),
        ({"num_hops": 0}, "num_hops"),
        ({"num_repeats": 1}, "num_repeats"),
        ({"facts_per_100_words": 0.0}, "facts_per_100_words"),
        ({"shortest_length": 97}, "shortest_length"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        replace(TaskConfig(), **settings)


def test_unknown_task_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="did you mean 'single_needle'"):
        generate_examples(TaskConfig(tasks=("single_neddle",)))


def test_facts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="length is 20"):
        generate_examples(TaskConfig(length=20))
    with pytest.raises(ConfigError, match="names needed"):
        draw_names(random.Random(0), len(NAMES) + 1)
