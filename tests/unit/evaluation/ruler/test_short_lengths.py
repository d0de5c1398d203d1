"""Any length from 256 up: documents that fit it, or the least length that has some."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest

from memdlm.errors import ConfigError
from memdlm.evaluation.tasks.ruler.task import RULER
from tests.unit.evaluation.ruler.conftest import filler_text


def documents(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the documents of a config."""
    return list(config["custom_dataset"]()["test"])


@pytest.fixture
def sources(tmp_path: Any) -> dict[str, str]:
    """A text for the tasks that need one."""
    path = tmp_path / "essays.txt"
    path.write_text(filler_text(3000), encoding="utf-8")
    return {"essays": str(path), "sentences": "simple"}


@pytest.mark.parametrize("length", [256, 300, 512, 777, 1024])
@pytest.mark.parametrize("name", list(RULER))
def test_documents_fit_their_length_or_the_least_one_is_named(
    name: str,
    length: int,
    make: Callable[..., dict[str, Any]],
    sources: dict[str, str],
    tokenizer: Any,
    few_words: None,
) -> None:
    try:
        config = make(name, length, **sources)
    except ConfigError as error:
        match = re.search(rf"write {name}@(\d+) or more$", str(error))
        assert match is not None
        assert length < int(match[1]) <= 352
        length = int(match[1])
        config = make(name, length, **sources)
    found = documents(config)
    assert len(found) == 3
    granted = config["generation_kwargs"]["max_gen_toks"]
    assert granted <= RULER[name].max_new_tokens
    for document in found:
        assert document["max_length"] == length
        # As in lm-eval, the beginning of a needle's answer and a frequent word's answer are on top.
        reserve = 0 if name == "ruler_fwe" else granted
        assert len(tokenizer(document["input"]).input_ids) + reserve <= length
        if name != "ruler_cwe":
            assert document["outputs"][0] in document["input"]
        assert len(set(document["outputs"])) == len(document["outputs"]) > 0


@pytest.mark.parametrize(("length", "examples"), [(320, 0), (640, 1), (2048, 1)])
def test_a_chain_is_whole_and_has_a_solved_example_where_there_is_room(
    length: int, examples: int, make: Callable[..., dict[str, Any]]
) -> None:
    for document in documents(make("ruler_vt", length)):
        *before, text = document["input"].split("Memorize and track")[1:]
        assert len(before) == examples
        names = document["outputs"]
        (value,) = re.findall(rf"VAR {names[0]} = (\d+)", text)
        assert f"assigned the value {value} in" in text
        for first, second in pairwise(names):
            assert f"VAR {second} = VAR {first} " in text
        for example in before:
            question, answer = example.split("they are: ")
            assert len(answer.split()) == 5
            assert all(f"VAR {name} = " in question for name in answer.split())


@pytest.mark.parametrize(("length", "num_common"), [(384, 5), (512, 10), (2048, 10)])
def test_common_words_are_the_most_common(
    length: int, num_common: int, make: Callable[..., dict[str, Any]], few_words: None
) -> None:
    config = make("ruler_cwe", length)
    assert config["generation_kwargs"]["max_gen_toks"] == 12 * num_common
    for document in documents(config):
        words = re.findall(r"\d+\. (.*?)(?= \d+\. |\n)", document["input"].split("\n")[1] + "\n")
        counts = Counter(words)
        assert len(document["outputs"]) == num_common
        assert f"What are the {num_common} most common words" in document["input"]
        assert f"The top {num_common} words" in document["gen_prefix"]
        least = min(counts[word] for word in document["outputs"])
        others = [n for word, n in counts.items() if word not in document["outputs"]]
        assert others
        assert max(others) < least


@pytest.mark.parametrize("length", [320, 512, 2048])
def test_frequent_words_are_the_three_after_the_dots(
    length: int, make: Callable[..., dict[str, Any]]
) -> None:
    for document in documents(make("ruler_fwe", length)):
        text = document["input"].split("coded words. ")[1].split("\n")[0]
        ranked = Counter(text.split()).most_common()
        assert [word for word, _ in ranked[:4]] == ["...", *document["outputs"]]
        assert len({n for _, n in ranked[:5]}) == 5, "a tie has no answer"


def test_lm_eval_asks_an_empty_list_where_we_ask_a_short_one(
    lm_eval_module: Callable[..., ModuleType], tokenizer: Any, make: Callable[..., dict[str, Any]]
) -> None:
    (theirs,) = lm_eval_module("cwe_utils").sys_word_pair_random(1, 512, tokenizer)
    assert theirs["outputs"] == []
    (ours,) = documents(make("ruler_cwe", 512, num_samples=1))
    assert len(ours["outputs"]) == 10


def test_identifiers_have_fewer_tokens_for_an_answer_where_128_leave_no_room(
    make: Callable[..., dict[str, Any]], few_words: None
) -> None:
    for length, granted in ((352, 40), (384, 64), (512, 128)):
        config = make("niah_multikey_3", length)
        assert config["generation_kwargs"]["max_gen_toks"] == granted
        assert all(document["length"] <= length for document in documents(config))


def test_the_named_length_holds_all_documents_of_a_full_evaluation(
    make: Callable[..., dict[str, Any]], few_words: None
) -> None:
    with pytest.raises(ConfigError, match="niah_multikey_3@") as caught:
        make("niah_multikey_3", 256, num_samples=100)
    least = int(str(caught.value).split("@")[2].split()[0])
    assert len(documents(make("niah_multikey_3", least, num_samples=100))) == 100
    with pytest.raises(ConfigError):
        make("niah_multikey_3", least - 32, num_samples=100)
