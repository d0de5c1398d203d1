"""What the tokenizer of each family holds: special tokens and chat format, one row per family.

The strings are facts of the checkpoints: models were trained on exactly these. LLaDA uses Llama 3's
headers and Dream ChatML as Qwen2.5 has it; LLaDA-MoE and LLaDA2.x use the roles of Ling 2.0, whose
vocabulary they share.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memdlm.backbones.base import DiffusionMaskedLM

# A header for each role, as Llama 3 has it; texts are trimmed.
_HEADERS = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ '<|startoftext|>' }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)

# Ling's roles. Every conversation opens with a system turn that ends by turning reasoning off.
_ROLES = (
    "{{ '<role>SYSTEM</role>' }}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n' }}"
    "{% endif %}"
    "{{ 'detailed thinking off<|role_end|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<role>HUMAN</role>' + message['content'] + '<|role_end|>' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<role>ASSISTANT</role>' + message['content'] + '<|role_end|>' }}"
    "{% elif message['role'] != 'system' %}"
    "{{ raise_exception('its roles are system, user and assistant') }}"
    "{% elif not loop.first %}"
    "{{ '<role>SYSTEM</role>' + message['content'] + '<|role_end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)

# ChatML as Qwen2.5 has it, with its default system turn.
_CHATML = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TokenizerFamily:
    """Special tokens and chat format of a family's tokenizer.

    Attributes:
        mask: Stands for a hidden token.
        end_of_text: Ends a text and pads.
        end_of_turn: Ends a turn of a chat, and with it an answer.
        markers: Tokens of which this family's vocabulary has at least one, and others' has none.
        chat_tokens: Special tokens that the template writes.
        chat_template: Jinja, as transformers takes it.
    """

    mask: str
    end_of_text: str
    end_of_turn: str
    markers: tuple[str, ...]
    chat_tokens: tuple[str, ...]
    chat_template: str


_LING = TokenizerFamily(
    mask="<|mask|>",
    end_of_text="<|endoftext|>",
    end_of_turn="<|role_end|>",
    markers=("<|role_end|>",),
    chat_tokens=("<role>", "</role>", "<|role_end|>"),
    chat_template=_ROLES,
)
# Keyed by model type.
TOKENIZER_FAMILIES: dict[str, TokenizerFamily] = {
    "llada": TokenizerFamily(
        mask="<|mdm_mask|>",
        end_of_text="<|endoftext|>",
        end_of_turn="<|eot_id|>",
        markers=("<|mdm_mask|>", "<|eot_id|>"),
        chat_tokens=("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        chat_template=_HEADERS,
    ),
    "lladamoe": _LING,
    "llada2_moe": _LING,
    "Dream": TokenizerFamily(
        mask="<|mask|>",
        end_of_text="<|endoftext|>",
        end_of_turn="<|im_end|>",
        markers=("<|im_end|>",),
        chat_tokens=("<|im_start|>", "<|im_end|>"),
        chat_template=_CHATML,
    ),
}

# Published tokenizers hold their mask token without saying that it is one.
KNOWN_MASK_TOKENS = tuple(dict.fromkeys(row.mask for row in TOKENIZER_FAMILIES.values()))

# Tokenizer classes that come as code beside a checkpoint -> the same algorithm in transformers.
NATIVE_TOKENIZER_CLASSES = {"DreamTokenizer": "Qwen2Tokenizer"}


def model_type_of(fields: Mapping[str, Any]) -> str | None:
    """Return the official model type that the fields of a config.json stand for; None if not ours.

    `architectures` decides, since LLaDA-MoE is published with the model type of LLaDA.
    """
    types: dict[str, str] = {
        cls.__name__: cls.config_class.model_type
        for cls in DiffusionMaskedLM.__subclasses__()
        if cls.config_class is not None
    }
    for name in fields.get("architectures") or ():
        if name in types:
            return types[name]
    model_type = fields.get("model_type")
    return model_type if model_type in TOKENIZER_FAMILIES else None
