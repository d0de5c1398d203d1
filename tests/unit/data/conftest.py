"""Real tokenizers, small enough to build in each run: words, and byte-level BPE with a template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memdlm.data.tokenizer import build_word_tokenizer

TEXTS = [
    "Where is John ? John is in the garden .",
    "Say hello . Hello !",
    "one two three four five six seven eight nine ten",
]

# Close to the templates of the published checkpoints: a header per turn, an end-of-turn token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """A word tokenizer, which has no chat template."""
    return build_word_tokenizer(TEXTS)


def make_chat_tokenizer(template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer with the special tokens of the template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|mask|>", "<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*TEXTS, "a\n\n\nb", "c\n\n\nd"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<|start|>", "<|end|>"],
        chat_template=template,
    )


@pytest.fixture(scope="session")
def make_chat() -> Callable[..., PreTrainedTokenizerFast]:
    """The function that builds a chat tokenizer with a given template."""
    return make_chat_tokenizer


@pytest.fixture(scope="session")
def chat() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a Jinja chat template."""
    return make_chat_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a JSONL file and return its path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
