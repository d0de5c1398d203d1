"""Each thing a user can get wrong is one line that says how to mend it; nothing global changes."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import DataError, UsageError
from memdlm.evaluation.tasks.ruler import words
from memdlm.evaluation.tasks.ruler.haystack import essays_hub, split_simply
from memdlm.evaluation.tasks.ruler.task import RULER
from memdlm.evaluation.tasks.table import ALIASES, GROUPS, find_task
from memdlm.evaluation.tasks.task import TaskSources
from tests.unit.evaluation.ruler.conftest import filler_text

Make = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.usefixtures("few_words")


def text_file(folder: Path, text: str | bytes) -> str:
    """Write a file of essays."""
    path = folder / "essays.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "absent.txt cannot be read"),
        (b"\xff\xfe caf\xe9", "cannot be read"),
        (b" \n ", "holds no text; give one as sources.essays"),
        (filler_text(300), r"has \d+ words, which do not fill the length; give a longer text"),
    ],
)
def test_essays_that_cannot_be_used(
    content: str | bytes | None, message: str, make: Make, tmp_path: Path
) -> None:
    path = str(tmp_path / "absent.txt") if content is None else text_file(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        make("niah_single_2", 2048, essays=path, sentences="simple")
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_names_the_local_way(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"paul_graham_essays.*sources\.essays$") as caught:
        make("niah_multivalue", 1024, sentences="simple")
    assert "\n" not in str(caught.value)


def test_a_missing_sentence_splitter_names_the_ways_out(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import nltk

    def missing(*args: Any, **kwargs: Any) -> None:
        raise LookupError

    monkeypatch.setattr(nltk.data, "find", missing)
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)
    with pytest.raises(DataError, match=r"sources\.sentences=simple") as caught:
        make("niah_single_3", 1024, essays=text_file(tmp_path, filler_text(900)))
    assert "\n" not in str(caught.value)
    assert (
        essays_hub(TaskSources()) == "baber/paul_graham_essays (RULER) and nltk's punkt_tab (RULER)"
    )
    assert essays_hub(TaskSources(essays="x", sentences="simple")) is None


def test_punkt_splits_where_it_is_here(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "find", lambda *args, **kwargs: "here")
    monkeypatch.setattr(nltk, "sent_tokenize", split_simply)
    path = text_file(tmp_path, filler_text(2500))
    ours = make("niah_single_2", 2048, essays=path)["custom_dataset"]()["test"]
    simple = make("niah_single_2", 2048, essays=path, sentences="simple")
    assert ours["input"] == simple["custom_dataset"]()["test"]["input"]
    assert essays_hub(TaskSources(essays=path)) is None


@pytest.mark.parametrize("name", ["niah_single_1", "ruler_vt", "ruler_cwe", "ruler_fwe"])
def test_a_tokenizer_that_lacks_words_is_refused(name: str, make: Make) -> None:
    with pytest.raises(DataError, match=f"task {name}@1024: the tokenizer does not know"):
        make(name, 1024, tokenizer=build_word_tokenizer([filler_text(200)]))


def test_a_tokenizer_that_encodes_nothing_is_refused(make: Make) -> None:
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(DataError, match="encodes text to no tokens"):
        make("ruler_vt", 1024, tokenizer=empty)


def test_a_missing_package_names_the_extra(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    words.needle_words.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'memdlm\[eval\]'"):
        make("niah_single_1", 1024)


def test_documents_depend_on_the_seed_alone(make: Make) -> None:
    random.seed(11)
    np.random.seed(12)
    state, numbers = random.getstate(), np.random.get_state()[1]
    for name in ("niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"):
        three = make(name, 1024)["custom_dataset"]()["test"].to_list()
        assert make(name, 1024)["custom_dataset"]()["test"].to_list() == three
        assert make(name, 1024, num_samples=2)["custom_dataset"]()["test"].to_list() == three[:2]
        assert make(name, 1024, seed=1)["custom_dataset"]()["test"].to_list() != three
    assert random.getstate() == state
    assert (np.random.get_state()[1] == numbers).all()


def test_the_table_has_the_tasks_of_the_group_and_the_paper_s_name() -> None:
    assert GROUPS["ruler"] == tuple(RULER)
    assert ALIASES["ruler_mv"] == "niah_multivalue"
    task, length = find_task("ruler_mv@4k")
    assert (task, length) == (RULER["niah_multivalue"], 4096)
    with pytest.raises(UsageError, match="the shortest length is 256 tokens"):
        find_task("ruler_vt@128")
    assert {name: row.max_new_tokens for name, row in RULER.items() if "niah" not in name} == {
        "ruler_vt": 30,
        "ruler_cwe": 120,
        "ruler_fwe": 50,
    }
    assert {row.max_new_tokens for name, row in RULER.items() if "niah" in name} == {128}
    assert [name for name, row in RULER.items() if row.hub(TaskSources()) is not None] == [
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
        "niah_multivalue",
        "niah_multiquery",
    ]
