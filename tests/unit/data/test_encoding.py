"""Token ids: labels, end of text, the template's prefix rule, the window, prompts at inference."""

from collections.abc import Callable

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from memdlm.data.encoding import (
    Example,
    check_prompt_fits,
    check_tokenizer,
    columns_of,
    encode_dialogues,
    encode_prompt,
    fit_window,
)
from memdlm.data.formatting import Dialogue, plain_text, user_turn
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import DataError

Tokenizer = PreTrainedTokenizerFast
TURNS = (
    {"role": "system", "content": "Say hello ."},
    {"role": "user", "content": "Where is John ?"},
)


def plain(prompt: str, response: str) -> Dialogue:
    return Dialogue(user_turn(prompt), prompt, response, "f:1")


def test_texts_are_encoded_apart_and_closed_by_end_of_text(words: Tokenizer) -> None:
    [example] = encode_dialogues([plain("Where is John ?", "the garden .")], words)
    assert example.prompt_length == 4
    assert words.convert_ids_to_tokens(example.input_ids.tolist()) == [
        *("Where", "is", "John", "?"),
        *("the", "garden", ".", "<|endoftext|>"),
    ]


def test_texts_meet_without_merging_across_the_border(chat: Tokenizer) -> None:
    """BPE would merge "hel" + "lo" if the texts were joined before encoding."""
    [example] = encode_dialogues([plain("hel", "lo")], chat, chat_template="never")
    ids = example.input_ids.tolist()
    prompt = chat("hel")["input_ids"]
    assert ids == [*prompt, *chat("lo")["input_ids"], chat.eos_token_id]
    assert example.prompt_length == len(prompt)


def test_begin_of_text_opens_the_prompt_and_nothing_else() -> None:
    tokenizer = build_word_tokenizer(["a b c", "<s>"])
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    dialogue = plain("a b", "c")
    bare = encode_dialogues([dialogue], tokenizer)[0].input_ids.tolist()
    assert bare[0] == tokenizer.convert_tokens_to_ids("a")  # it has a bos, but does not use it
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|endoftext|>",
        special_tokens=[("<|start|>", bos), ("<|endoftext|>", eos)],
    )
    [example] = encode_dialogues([dialogue], tokenizer)
    assert example.input_ids.tolist() == [bos, *bare]
    assert example.prompt_length == 3
    assert encode_prompt(tokenizer, "a b") == [bos, *bare[:2]]


def test_chat_template_splits_at_its_generation_prompt(chat: Tokenizer) -> None:
    dialogue = Dialogue(TURNS, plain_text(TURNS), "in the garden", "f:1")
    [example] = encode_dialogues([dialogue], chat)
    ids = example.input_ids.tolist()
    # The ids are those of transformers' own path.
    whole = [*TURNS, {"role": "assistant", "content": "in the garden"}]
    assert ids == chat.apply_chat_template(whole, return_dict=False)
    prompt = chat.apply_chat_template(list(TURNS), add_generation_prompt=True, return_dict=False)
    assert ids[: example.prompt_length] == prompt
    assert chat.decode(ids[example.prompt_length :]) == "in the garden<|end|>"
    assert encode_prompt(chat, TURNS) == prompt


def test_prompt_string_is_a_user_turn_for_a_template(chat: Tokenizer) -> None:
    [example] = encode_dialogues([plain("Where ?", "here")], chat)
    expected = "<|start|>user\nWhere ?<|end|><|start|>assistant\n"
    assert chat.decode(example.input_ids[: example.prompt_length].tolist()) == expected
    assert encode_prompt(chat, "Where ?") == example.input_ids[: example.prompt_length].tolist()


@pytest.mark.parametrize("chat_template", ["auto", "never"])
def test_prompt_at_inference_has_the_ids_of_training(
    words: Tokenizer, chat: Tokenizer, chat_template: str
) -> None:
    for tokenizer in (words, chat):
        dialogue = Dialogue(TURNS, plain_text(TURNS), "garden", "f:1")
        [example] = encode_dialogues([dialogue], tokenizer, chat_template=chat_template)
        prompt = encode_prompt(tokenizer, TURNS, chat_template=chat_template)
        assert prompt == example.input_ids[: example.prompt_length].tolist()


def test_parts_of_a_prompt_are_found_among_its_tokens(words: Tokenizer, chat: Tokenizer) -> None:
    prompt = "Where is John ? John is in the garden ."
    # A part counts wherever it occurs.
    assert columns_of(words, prompt, ["John"]) == [word == "John" for word in prompt.split()]
    both = columns_of(words, prompt, ["is in the", "Where"])
    assert np.flatnonzero(both).tolist() == [0, 5, 6, 7]
    for template in ("auto", "never"):
        ids = encode_prompt(chat, prompt, chat_template=template)
        for part in ("John is in", "ohn is in th", "garden .", " John "):
            columns = columns_of(chat, prompt, [part], chat_template=template)
            assert len(columns) == len(ids)
            runs = "".join("x" if chosen else " " for chosen in columns).split()
            assert len(runs) == prompt.count(part.strip())
            text = chat.decode(np.array(ids)[columns])
            # The tokens hold the part, and no word beside those it touches.
            assert part.strip() in text
            assert len(text.split()) == len(runs) * len(part.split())
    columns = columns_of(chat, TURNS, ["hello"])
    assert "hello" in chat.decode(np.array(encode_prompt(chat, TURNS))[columns])


def test_begin_of_text_is_no_part_of_a_prompt() -> None:
    tokenizer = build_word_tokenizer(["a b c", "<s>"])
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    assert columns_of(tokenizer, "a b", ["a"]) == [False, True, False]


def test_parts_that_cannot_be_found_are_named(words: Tokenizer) -> None:
    for part, shown in (("Paris", "'Paris'"), (" ", "''"), ("x" * 80, "x" * 57 + "...")):
        with pytest.raises(DataError, match="the prompt does not contain") as caught:
            columns_of(words, "Where is John ?", ["John", part])
        assert shown in str(caught.value)

    class Slow(type(words)):
        is_fast = False

    slow = Slow(tokenizer_object=words.backend_tokenizer)
    with pytest.raises(DataError, match="use a fast one"):
        columns_of(slow, "Where is John ?", ["John"])


def test_encoding_many_at_once_equals_one_by_one(words: Tokenizer, chat: Tokenizer) -> None:
    dialogues = [plain("one " * n, "two " * (n % 3 + 1)) for n in range(1, 9)]
    for tokenizer in (words, chat):
        together = encode_dialogues(dialogues, tokenizer)
        for dialogue, example in zip(dialogues, together, strict=True):
            [alone] = encode_dialogues([dialogue], tokenizer)
            np.testing.assert_array_equal(alone.input_ids, example.input_ids)
            assert alone.prompt_length == example.prompt_length


def template_fails(tokenizer: Tokenizer, dialogue: Dialogue) -> str:
    with pytest.raises(DataError) as caught:
        encode_dialogues([plain("Where ?", "here"), dialogue], tokenizer)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("f:2")
    return str(caught.value)


def test_template_whose_prompt_is_no_prefix_is_refused(chat: Tokenizer) -> None:
    # The line breaks of the generation prompt and of the response merge into one BPE token.
    dialogue = Dialogue(user_turn("a"), "a", "\n\nb", "f:2")
    assert "is not the beginning of its whole conversation" in template_fails(chat, dialogue)


def test_template_that_refuses_or_ignores_is_reported(
    make_chat: Callable[[str], Tokenizer],
) -> None:
    refusing = make_chat(
        "{% for m in messages %}{% if m['content'] == 'bad' %}"
        "{{ raise_exception('no\nbad words') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    dialogue = Dialogue(user_turn("bad"), "bad", "b", "f:2")
    assert "refuses the conversation (no bad words)" in template_fails(refusing, dialogue)
    deaf = make_chat(
        "{% for m in messages %}{% if m['content'] != 'lost' %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    dialogue = Dialogue(user_turn("a"), "a", "lost", "f:2")
    assert "adds no token for the response" in template_fails(deaf, dialogue)


def test_mask_token_inside_a_text_is_refused(words: Tokenizer) -> None:
    for dialogue in (plain("a", "one <|mask|>"), plain("<|mask|>", "one")):
        with pytest.raises(DataError, match=r"f:1 contains the mask token '<\|mask\|>'"):
            encode_dialogues([dialogue], words)


@pytest.mark.parametrize("max_length", range(2, 14))
@pytest.mark.parametrize("prompt_length", range(0, 10))
@pytest.mark.parametrize("response_length", [1, 2, 5])
def test_cut_keeps_a_response_token_and_the_middle(
    max_length: int, prompt_length: int, response_length: int
) -> None:
    ids = np.arange(prompt_length + response_length, dtype=np.int32)
    fitted = fit_window(Example(ids, prompt_length), max_length)
    kept = fitted.input_ids.tolist()
    assert len(kept) == min(len(ids), max_length)
    assert kept == list(range(kept[0], kept[0] + len(kept)))  # one piece, in order
    assert len(kept) - fitted.prompt_length >= 1
    assert kept[fitted.prompt_length] == prompt_length  # the response's own first token
    if prompt_length < max_length:
        assert kept[0] == 0  # the prompt is whole, only the response was cut
    else:
        assert len(kept) - fitted.prompt_length == 1


@pytest.mark.parametrize("token", ["mask", "eos", "pad"])
def test_tokenizer_without_a_needed_token(token: str) -> None:
    tokenizer = build_word_tokenizer(["a"])
    check_tokenizer(tokenizer)
    setattr(tokenizer, f"{token}_token", None)
    with pytest.raises(DataError, match=f"has no {token} token: .*tokenizer.{token}_token"):
        check_tokenizer(tokenizer)


def test_prompt_longer_than_the_context() -> None:
    check_prompt_fits(10, 10)
    check_prompt_fits(6, 10, 4)
    with pytest.raises(DataError, match="prompt of 11 tokens exceeds the model's context of 10"):
        check_prompt_fits(11, 10)
    with pytest.raises(DataError, match=r"of 7 tokens and 4 new ones exceeds .* fewer new tokens"):
        check_prompt_fits(7, 10, 4)
