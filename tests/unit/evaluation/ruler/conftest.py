"""A quick tokenizer, a text that stands in for the essays, and lm-eval's own RULER without network.

wonderwords is shortened for both sides: lm-eval makes a list of all its pairs, six million.
"""

import importlib
import random
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memdlm.data.tasks.words import filler_sentence
from memdlm.evaluation.tasks.ruler import words
from memdlm.evaluation.tasks.ruler.task import RULER
from memdlm.evaluation.tasks.task import TaskRequest, TaskSources


def filler_text(num_words: int) -> str:
    """Return sentences of at most nine words, the same at each call."""
    rng = random.Random(7)
    found: list[str] = []
    while len(found) < num_words:
        *sentence, _ = filler_sentence(rng, 9)
        found += " ".join(sentence).capitalize().split()
        found[-1] += rng.choice(".?!")
    return " ".join(found)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4000 tokens that knows many words of the tasks."""
    from memdlm.evaluation.tasks.ruler import common_words, frequent_words, variable_tracking
    from memdlm.evaluation.tasks.ruler.haystack import NOISE

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    questions = [module._QUESTION for module in (common_words, frequent_words, variable_tracking)]
    texts = [*words.list_words()[::2], filler_text(400), *[NOISE, *questions] * 20]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def few_words() -> Iterator[None]:
    """Shorten wonderwords' nouns for as long as a module's tests run."""
    from wonderwords.random_word import _DEFAULT_CATEGORIES, Defaults

    nouns = _DEFAULT_CATEGORIES[Defaults.NOUNS]
    _DEFAULT_CATEGORIES[Defaults.NOUNS] = nouns[::100]
    for cached in (words.needle_words, words.list_words):
        cached.cache_clear()
    yield
    _DEFAULT_CATEGORIES[Defaults.NOUNS] = nouns
    for cached in (words.needle_words, words.list_words):
        cached.cache_clear()


@pytest.fixture
def lm_eval_module(few_words: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports a module of lm-eval's RULER afresh, generators at their seed.

    The needles' module downloads nltk's data when it is imported unless it finds them.
    """
    import nltk

    monkeypatch.setattr(nltk.data, "find", lambda *args, **kwargs: "here")

    def load(name: str, seed: int = 0) -> ModuleType:
        full = f"lm_eval.tasks.ruler.{name}"
        monkeypatch.delitem(sys.modules, full, raising=False)
        module = importlib.import_module(full)
        monkeypatch.delitem(sys.modules, full)  # its words are those of these tests
        random.seed(seed)
        np.random.seed(1234 + seed)
        return module

    return load


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast) -> Callable[..., dict[str, Any]]:
    """Return a function that builds a task's config with the quick tokenizer."""

    def build(
        name: str,
        length: int,
        *,
        num_samples: int = 3,
        seed: int = 0,
        tokenizer: Any = tokenizer,
        **sources: str,
    ) -> dict[str, Any]:
        request = TaskRequest(
            name=f"{name}@{length}",
            tokenizer=tokenizer,
            length=length,
            num_samples=num_samples,
            seed=seed,
            sources=TaskSources(**sources),
        )
        return RULER[name].build(request)

    return build
