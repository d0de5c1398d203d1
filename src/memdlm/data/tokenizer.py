"""Word tokenizers built from the data, for tiny models: one token per word, number or sign.

White space only separates, so "Paris" after a space and at the start of a response is one token,
and a response needs no leading space. Decoding puts single spaces between tokens and none before
closing or after opening punctuation. Line breaks are not kept.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from memdlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
UNKNOWN = "<unk>"

# A word, with apostrophes (straight or curly) and hyphens inside it, or one other visible sign.
_TOKEN = r"\w+(?:['\u2019\-]\w+)*|[^\w\s]"


def build_word_tokenizer(
    texts: Iterable[str], *, extra_words: Iterable[str] = (), max_words: int | None = None
) -> "PreTrainedTokenizerFast":
    """Build a tokenizer whose vocabulary is the words of the texts.

    The result is an ordinary fast tokenizer: `save_pretrained` and `AutoTokenizer.from_pretrained`
    round-trip. Ids: 0 end of text, which is also the padding (as in LLaDA), 1 mask, 2 unknown, then
    words by falling frequency, ties in code point order: the same texts give the same ids.

    Args:
        texts: Training texts, prompts and responses.
        extra_words: Words to know although no text has them, e.g. the values of a test split; split
            like texts and never dropped by `max_words`.
        max_words: Keep only so many of the most frequent words; the rest become unknown.

    Raises:
        ConfigError: `max_words` is below 1.
        DataError: The texts contain no word.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if max_words is not None and max_words < 1:
        raise ConfigError(f"max_words is {max_words}: use 1 or more, or null for all words")
    splitter = pre_tokenizers.Split(Regex(_TOKEN), behavior="removed", invert=True)

    def words(lines: Iterable[str]) -> Counter[str]:
        return Counter(word for line in lines for word, _ in splitter.pre_tokenize_str(line))

    counts = words(texts)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
    extra = sorted(set(words(extra_words)).difference(ordered))
    if not ordered and not extra:
        raise DataError("no word to build a tokenizer from: give texts that are not empty")
    vocabulary = {
        token: i for i, token in enumerate([END_OF_TEXT, MASK, UNKNOWN, *ordered, *extra])
    }

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence(
        [
            # Joins tokens with spaces. "##" cannot begin a word here, so nothing is glued.
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[.,;:!?%)\]}])"), ""),
            decoders.Replace(Regex(r"(?<=[(\[{]) "), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        unk_token=UNKNOWN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def check_encodable(tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
    """Raise a DataError that names the words of a text the tokenizer does not know, if any."""
    unknown_id = tokenizer.unk_token_id
    if unknown_id is None:
        return
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    unknown = dict.fromkeys(text[start:end] for i, (start, end) in spans if i == unknown_id)
    if unknown:
        shown = ", ".join(map(repr, list(unknown)[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"the tokenizer does not know {len(unknown)} word(s) of the text ({shown}): use words "
            "of its training data, or build it with extra_words"
        )
