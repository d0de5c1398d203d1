"""Tokenizers of each family, in the shape of their published files: completed, never overruled."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memdlm.backbones.dream import DreamConfig
from memdlm.backbones.llada import LLaDAConfig
from memdlm.backbones.llada2 import LLaDA2Config
from memdlm.backbones.llada_moe import LLaDAMoEConfig
from memdlm.backbones.tiny import TINY_FAMILIES, TinySizes, build_tiny
from memdlm.backbones.tokenizer_families import TOKENIZER_FAMILIES
from memdlm.backbones.tokenizers import load_tokenizer, match_token_ids
from memdlm.data.encoding import encode_dialogues, encode_prompt, end_of_turn_id
from memdlm.data.formatting import Dialogue, plain_text, user_turn
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import CheckpointError, DataError
from memdlm.inference import generate
from memdlm.sampling.config import SamplingConfig

CONFIGS = {
    "llada": LLaDAConfig,
    "lladamoe": LLaDAMoEConfig,
    "llada2_moe": LLaDA2Config,
    "Dream": DreamConfig,
}
ARCHITECTURES = {
    "llada": "LLaDAModelLM",
    "lladamoe": "LLaDAMoEModelLM",
    "llada2_moe": "LLaDA2MoeModelLM",
    "Dream": "DreamModel",
}
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
# Special tokens in the order of their ids, which follow the letters.
SPECIAL = {
    model_type: list(
        dict.fromkeys(
            ["<|startoftext|>", row.end_of_text, *row.chat_tokens, *row.markers, row.mask]
        )
    )
    for model_type, row in TOKENIZER_FAMILIES.items()
}
TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?"},
)
# What the models were trained on, up to where the answer to TURNS begins; then that answer's end.
PROMPTS = {
    "llada": (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "lladamoe": (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|>"
        "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>Hello<|role_end|>"
        "<role>HUMAN</role>Who?<|role_end|><role>ASSISTANT</role>"
    ),
    "Dream": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}
PROMPTS["llada2_moe"] = PROMPTS["lladamoe"]
BARE = {
    "llada": PROMPTS["llada"].split("system<|end")[0]
    + "user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "lladamoe": "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    "<role>HUMAN</role>Who?<|role_end|><role>ASSISTANT</role>",
    "Dream": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
}
BARE["llada2_moe"] = BARE["lladamoe"]


def make_tokenizer(model_type: str, **declared: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes and the family's special tokens; `declared` is what files say."""
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL[model_type])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **declared)


def write_folder(folder: Path, model_type: str, config: object = None, **declared: str) -> Path:
    """Write a tokenizer and, unless `config` is False, a config.json as published."""
    make_tokenizer(model_type, **declared).save_pretrained(folder)
    if config is not False:
        fields = {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]]}
        (folder / "config.json").write_text(json.dumps({**fields, **(config or {})}))
    return folder


@pytest.fixture(params=list(TOKENIZER_FAMILIES))
def model_type(request) -> str:
    return request.param


def test_a_row_for_every_family_and_its_tokens_among_what_it_writes() -> None:
    assert TOKENIZER_FAMILIES.keys() == {
        row.config_class.model_type for row in TINY_FAMILIES.values()
    }
    for row in TOKENIZER_FAMILIES.values():
        assert row.end_of_turn in row.chat_tokens
        assert all(token in row.chat_template for token in row.chat_tokens)


def test_what_the_files_lack_comes_from_the_family(model_type, tmp_path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, model_type))
    row = TOKENIZER_FAMILIES[model_type]
    assert tokenizer.mask_token == row.mask
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.chat_template == row.chat_template
    assert len(tokenizer) == len(LETTERS) + len(SPECIAL[model_type])
    again = tmp_path / "again"
    tokenizer.save_pretrained(again)
    reloaded = load_tokenizer(again)
    assert reloaded.mask_token == row.mask and reloaded.chat_template == row.chat_template


def test_what_the_files_say_is_never_replaced(model_type, tmp_path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    declared = {"mask_token": "<|startoftext|>", "pad_token": "!", "chat_template": template}
    tokenizer = load_tokenizer(write_folder(tmp_path, model_type, **declared))
    assert {name: getattr(tokenizer, name) for name in declared} == declared


def test_a_vocabulary_without_the_tokens_gets_no_template(model_type, tmp_path) -> None:
    build_word_tokenizer(["a b c"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": model_type, "architectures": [ARCHITECTURES[model_type]]})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template is None and end_of_turn_id(tokenizer) is None
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, 0)


def test_a_conversation_is_what_the_family_was_trained_on(model_type, tmp_path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, model_type))
    assert tokenizer.decode(encode_prompt(tokenizer, TURNS)) == PROMPTS[model_type]
    assert tokenizer.decode(encode_prompt(tokenizer, "Who?")) == BARE[model_type]
    special = {tokenizer.convert_tokens_to_ids(t) for t in SPECIAL[model_type]}
    used = {token for token in SPECIAL[model_type] if token in PROMPTS[model_type]}
    assert len(special & set(encode_prompt(tokenizer, TURNS))) == len(used) > 1


def test_a_system_turn_in_the_middle_keeps_its_place(tmp_path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, "llada2_moe"))
    turns = [TURNS[1], TURNS[0], TURNS[3]]
    assert tokenizer.decode(encode_prompt(tokenizer, turns)) == (
        "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Hi<|role_end|>"
        "<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>Who?<|role_end|>"
        "<role>ASSISTANT</role>"
    )
    with pytest.raises(DataError, match="its roles are system, user and assistant"):
        encode_prompt(tokenizer, [{"role": "tool", "content": "x"}])


def test_the_response_is_labelled_up_to_its_end_of_turn(model_type, tmp_path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, model_type))
    dialogue = Dialogue(TURNS, plain_text(TURNS), "I am.", "f:1")
    [example] = encode_dialogues([dialogue], tokenizer)
    ids = example.input_ids.tolist()
    assert ids[: example.prompt_length] == encode_prompt(tokenizer, TURNS)
    end = TOKENIZER_FAMILIES[model_type].end_of_turn
    assert tokenizer.decode(ids[example.prompt_length :]) == f"I am.{end}"
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(end) == ids[-1]


def test_a_template_that_always_asks_for_an_answer_adds_nothing_to_the_response(tmp_path) -> None:
    # Llama 3's first template, which ignores add_generation_prompt.
    row = TOKENIZER_FAMILIES["llada"]
    always = row.chat_template.replace("{% if add_generation_prompt %}", "{% if true %}")
    tokenizer = load_tokenizer(write_folder(tmp_path, "llada", chat_template=always))
    assert tokenizer.chat_template == always
    dialogue = Dialogue(user_turn("Who?"), "Who?", "I <|eot_id|> am.", "f:1")
    [example] = encode_dialogues([dialogue], tokenizer)
    response = tokenizer.decode(example.input_ids[example.prompt_length :].tolist())
    assert response == "I <|eot_id|> am.<|eot_id|>"


@pytest.mark.parametrize("model_type", ["llada", "Dream"])
def test_an_answer_ends_with_its_turn(model_type, tmp_path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, model_type))
    families = {"llada": "llada", "Dream": "dream"}
    sizes = TinySizes(width=16, num_layers=1, num_heads=2, mlp_width=16)
    model = build_tiny(families[model_type], tokenizer, sizes=sizes)
    end = end_of_turn_id(tokenizer)
    others = tuple(i for i in range(len(tokenizer)) if i != end)
    sampling = SamplingConfig(max_new_tokens=4, suppress_tokens=others)
    [answer] = generate(model, tokenizer, ["Who?"], sampling)
    assert answer.token_ids == () and answer.text == ""
    [whole] = generate(model, tokenizer, ["Who?"], replace(sampling, stop_at_eos=False))
    assert whole.token_ids == (end,) * 4


def test_an_adapter_brings_the_family_of_its_base(tmp_path) -> None:
    write_folder(tmp_path / "base", "llada")
    adapter = tmp_path / "adapter"
    make_tokenizer("llada").save_pretrained(adapter)
    fields = {"peft_type": "LORA", "base_model_name_or_path": "../base"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    row = TOKENIZER_FAMILIES["llada"]
    assert load_tokenizer(adapter).chat_template == row.chat_template


def test_without_a_config_the_vocabulary_tells_the_mask_token(model_type, tmp_path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, model_type, config=False))
    assert tokenizer.mask_token == TOKENIZER_FAMILIES[model_type].mask
    assert tokenizer.chat_template is None


def test_ids_the_tokenizer_lacks_come_from_the_config(tmp_path) -> None:
    mask, pad, eos = 5, 6, [7, 8]
    config = {"mask_token_id": mask, "pad_token_id": pad, "eos_token_id": eos}
    fields = {"model_type": "bert", **config}
    folder = write_folder(tmp_path, "Dream", config=False)
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="says mask_token_id 5, which is"):
        load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(fields | {"mask_token_id": None}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (6, 7)
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)}))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "config.json").write_text(json.dumps(fields))
    tokenizer = load_tokenizer(tmp_path / "words")
    ids = (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert ids == (mask, pad, 7)
    assert len(tokenizer) == 9


@pytest.mark.parametrize("other", ["lladamoe", "Dream"])
def test_the_tokenizer_of_another_family_is_refused(other, tmp_path) -> None:
    mine = {"model_type": "llada", "architectures": ["LLaDAModelLM"]}
    folder = write_folder(tmp_path, other, config=mine, mask_token="<|mask|>")
    with pytest.raises(CheckpointError, match="it is another family's than the model's") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="it is another family's than the model's"):
        match_token_ids(LLaDAConfig(), make_tokenizer(other))


@pytest.mark.parametrize("field", ["mask", "pad", "eos"])
def test_ids_that_two_files_say_differently_are_refused(field, model_type, tmp_path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, model_type))
    names = [f"{kind}_token_id" for kind in ("mask", "pad", "eos")]
    ids = {name: getattr(tokenizer, name) for name in names}
    size = {"vocab_size": len(tokenizer)}
    match_token_ids(CONFIGS[model_type](**size, **ids), tokenizer)
    wrong = CONFIGS[model_type](**size, **{**ids, f"{field}_token_id": 3})
    with pytest.raises(CheckpointError, match=f"config.json says {field}_token_id 3") as error:
        match_token_ids(wrong, tokenizer)
    assert "\n" not in str(error.value)


def test_the_published_mask_id_counts_though_the_config_does_not_write_it(model_type) -> None:
    config = CONFIGS[model_type]()
    tokenizer = make_tokenizer(model_type, mask_token=TOKENIZER_FAMILIES[model_type].mask)
    with pytest.raises(CheckpointError, match=f"mask_token_id {config.mask_token_id}, the token"):
        match_token_ids(config, tokenizer)


def test_a_tokenizer_may_call_the_end_of_turn_its_end_of_text(model_type) -> None:
    row = TOKENIZER_FAMILIES[model_type]
    tokenizer = make_tokenizer(model_type, eos_token=row.end_of_turn)
    text_end = tokenizer.convert_tokens_to_ids(row.end_of_text)
    config = CONFIGS[model_type](vocab_size=len(tokenizer), eos_token_id=text_end)
    match_token_ids(config, tokenizer)
    assert config.eos_token_id == text_end != tokenizer.eos_token_id


def test_dreams_tokenizer_loads_without_its_code(tmp_path) -> None:
    """Published as vocab.json, merges.txt and a class of its own; Qwen2's does the same."""
    specials = SPECIAL["Dream"]
    ids = {token: len(LETTERS) + 1 + i for i, token in enumerate(specials)}
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"he": len(LETTERS)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    decoder = {str(i): {"content": token, "special": True} for token, i in ids.items()}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": decoder,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenization_dream.py").write_text("raise SystemExit('executed')")
    config = {"model_type": "Dream", "architectures": ["DreamModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("he 42<|mask|>")["input_ids"])
    assert tokens == ["he", "Ġ", "4", "2", "<|mask|>"]  # digits stand alone, as in Qwen2.5
    assert tokenizer.mask_token_id == ids["<|mask|>"]
    assert tokenizer.decode(encode_prompt(tokenizer, TURNS)) == PROMPTS["Dream"]
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again("he 42<|mask|>")["input_ids"] == tokenizer("he 42<|mask|>")["input_ids"]
