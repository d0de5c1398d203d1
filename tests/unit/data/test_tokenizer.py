"""The word tokenizer: readable text back, saved and loaded whole, the same for the same texts."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from memdlm.data.tokenizer import build_word_tokenizer, check_encodable
from memdlm.errors import ConfigError, DataError

TEXTS = [
    "Mary moved to the bathroom. Where is Mary? bathroom",
    "Alice's cat isn\u2019t well-known (grey, 12% white): is it? [it: yes]; no!",
]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_restores_readable_text(text: str) -> None:
    tokenizer = build_word_tokenizer(TEXTS)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_white_space_only_separates() -> None:
    tokenizer = build_word_tokenizer(TEXTS)
    assert tokenizer(" Mary\n moved\t")["input_ids"] == tokenizer("Mary moved")["input_ids"]
    assert len(tokenizer("Alice's isn\u2019t well-known?")["input_ids"]) == 4


def test_special_tokens() -> None:
    tokenizer = build_word_tokenizer(TEXTS)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer("Mary <|mask|> <|mask|>. stranger<|endoftext|>")["input_ids"]
    assert ids[1:3] == [1, 1] and ids[4:] == [2, 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Mary."
    assert tokenizer.decode(ids) == "Mary <|mask|> <|mask|>. <unk> <|endoftext|>"
    assert tokenizer("")["input_ids"] == []


def test_ids_depend_on_the_texts_alone() -> None:
    one, two = build_word_tokenizer(TEXTS), build_word_tokenizer(iter(TEXTS[::-1]))
    assert one.get_vocab() == two.get_vocab()
    assert sorted(one.get_vocab().values()) == list(range(len(one)))
    counted = build_word_tokenizer(["b c b a", "c b"])
    assert counted.convert_ids_to_tokens([3, 4, 5]) == ["b", "c", "a"]


def test_saving_and_loading_restores_everything(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(TEXTS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for name in ("eos_token_id", "pad_token_id", "mask_token_id", "unk_token_id", "padding_side"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for text in [*TEXTS, "Mary <|mask|> unseen words.<|endoftext|>"]:
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(TEXTS[1])["input_ids"] == tokenizer(TEXTS[1])["input_ids"]


def test_extra_words_survive_a_limit() -> None:
    tokenizer = build_word_tokenizer(["a a a b b c"], extra_words=["zu kamo", "a"], max_words=2)
    assert set(tokenizer.get_vocab()) == {
        *("<|endoftext|>", "<|mask|>", "<unk>"),
        *("a", "b", "kamo", "zu"),
    }
    # "a" is asked for twice: it must not leave an id without a token.
    assert sorted(tokenizer.get_vocab().values()) == list(range(7))
    check_encodable(tokenizer, "zu a kamo b")
    with pytest.raises(ConfigError, match="max_words is 0"):
        build_word_tokenizer(TEXTS, max_words=0)


def test_no_words() -> None:
    with pytest.raises(DataError, match="no word to build a tokenizer from"):
        build_word_tokenizer(["", " \n"])


def test_unknown_words_are_named() -> None:
    tokenizer = build_word_tokenizer(TEXTS)
    check_encodable(tokenizer, TEXTS[0])
    with pytest.raises(DataError) as caught:
        check_encodable(tokenizer, "Mary met Bob, and Bob left.")
    assert "does not know 4 word(s) of the text ('met', 'Bob', 'and', 'left')" in str(caught.value)
    with pytest.raises(DataError, match=r"7 word\(s\) .*, \.\.\.\)"):
        check_encodable(tokenizer, "q w e r t z u")


def test_a_tokenizer_that_knows_every_text_has_nothing_to_refuse() -> None:
    tokenizer = build_word_tokenizer(TEXTS)
    tokenizer.unk_token = None
    check_encodable(tokenizer, "anything")
