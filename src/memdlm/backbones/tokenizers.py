"""Load tokenizers, and hold a tokenizer and a model's config to the same token ids.

What the published files leave out comes from the family's row in `tokenizer_families`, or from
config.json; nothing that a file says is replaced, and what two files say differently is an error.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from memdlm.backbones.adapters import base_of_adapter
from memdlm.backbones.reading import check_exists, read_config, readable
from memdlm.backbones.tokenizer_families import (
    KNOWN_MASK_TOKENS,
    NATIVE_TOKENIZER_CLASSES,
    TOKENIZER_FAMILIES,
    TokenizerFamily,
    model_type_of,
)
from memdlm.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKEN_IDS = ("mask_token_id", "pad_token_id", "eos_token_id")


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer and complete it: mask, padding and end-of-text token, chat template.

    The config.json beside it, or that of an adapter's base, tells the family; without one the
    vocabulary does, as far as the mask token. Tokens and template are set only where the files lack
    them and the vocabulary has them. An adapter folder without tokenizer files lends its base's.

    Raises:
        CheckpointError: There is no readable tokenizer, it belongs to another family than the
            config, or the two disagree about the mask token.
        DataError: The tokenizer has no mask token.
    """
    name = str(name_or_path)
    folder, base = Path(name), name
    if (folder / "adapter_config.json").is_file():
        base = base_of_adapter(folder)
        if not any(folder.glob("tokenizer*")):
            name = base
    check_exists(name)
    with readable(name, "tokenizer"):
        tokenizer = _read(name)
        fields = _config_fields(base)
    model_type = model_type_of(fields)
    family = None if model_type is None else TOKENIZER_FAMILIES[model_type]
    if family is not None:
        _check_family(tokenizer, family, name)
    _set_mask(tokenizer, family, fields, name)
    _set_ends(tokenizer, family, fields)
    if family is not None and not tokenizer.chat_template:
        vocabulary = tokenizer.get_vocab()
        if all(token in vocabulary for token in family.chat_tokens):
            tokenizer.chat_template = family.chat_template
    return tokenizer


def match_token_ids(
    config: PreTrainedConfig, tokenizer: "PreTrainedTokenizerBase", name: str = "the model"
) -> None:
    """Give `config` the mask, padding and end-of-text ids it lacks, and refuse ids that differ.

    A default beyond the vocabulary counts as lacking: it belongs to the published sizes. A
    tokenizer that calls the end of a turn its end-of-text token agrees with a config that names the
    end of the text: answers end at either.

    Raises:
        CheckpointError: Model and tokenizer are of different families, or disagree about an id or
            the size of the vocabulary.
    """
    family = TOKENIZER_FAMILIES.get(config.model_type)
    if family is not None:
        _check_family(tokenizer, family, name)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{name} has {config.vocab_size:,} token embeddings but the tokenizer "
            f"{len(tokenizer):,} tokens: use the tokenizer that belongs to the model"
        )
    for field in _TOKEN_IDS:
        ours, theirs = getattr(config, field), getattr(tokenizer, field)
        known = [i for i in _as_list(ours) if i < config.vocab_size]
        if theirs is None:
            continue
        if not known:
            setattr(config, field, theirs)
        elif theirs not in known and not (
            field == "eos_token_id" and family and tokenizer.eos_token == family.end_of_turn
        ):
            raise CheckpointError(
                f"{name}: config.json says {field} {ours}, the tokenizer says {theirs}: use the "
                f"tokenizer that belongs to the model, or correct {field} in config.json"
            )


def _read(name: str) -> "PreTrainedTokenizerBase":
    # Dream's class is code beside the checkpoint; the same algorithm is in transformers.
    native = NATIVE_TOKENIZER_CLASSES.get(get_tokenizer_config(name).get("tokenizer_class", ""))
    loader: Any = AutoTokenizer if native is None else getattr(transformers, native)
    extra = {"trust_remote_code": False} if native is None else {}
    tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(name, **extra)
    return tokenizer


def _config_fields(name: str) -> Mapping[str, Any]:
    """Return the fields of the config.json in a folder or hub name; none where there is none."""
    if Path(name).is_dir():
        return read_config(name) if (Path(name) / "config.json").is_file() else {}
    path = cached_file(
        name,
        "config.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return {} if path is None else dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _check_family(tokenizer: "PreTrainedTokenizerBase", family: TokenizerFamily, name: str) -> None:
    """Refuse a vocabulary that is clearly another family's; a vocabulary of words passes."""
    vocabulary = tokenizer.get_vocab()
    if any(token in vocabulary for token in family.markers):
        return
    foreign = [
        token
        for other in TOKENIZER_FAMILIES.values()
        for token in other.markers
        if token in vocabulary
    ]
    if foreign:
        raise CheckpointError(
            f"{name}: the tokenizer has {foreign[0]} and not {family.markers[0]}, so it is another "
            "family's than the model's: use the tokenizer that belongs to the model"
        )


def _set_mask(
    tokenizer: "PreTrainedTokenizerBase",
    family: TokenizerFamily | None,
    fields: Mapping[str, Any],
    name: str,
) -> None:
    if tokenizer.mask_token_id is not None:
        return
    vocabulary = tokenizer.get_vocab()
    preferred = (() if family is None else (family.mask,)) + KNOWN_MASK_TOKENS
    known = [token for token in preferred if token in vocabulary]
    named = _token_of(tokenizer, fields.get("mask_token_id"))
    if named is not None and known and named not in known:
        raise CheckpointError(
            f"{name}: config.json says mask_token_id {fields['mask_token_id']}, which is "
            f"{named!r}, but the tokenizer has the mask token {known[0]!r}: use the tokenizer that "
            "belongs to the model, or correct mask_token_id in config.json"
        )
    token = named or (known[0] if known else None)
    if token is None:
        raise DataError(
            f'the tokenizer of {name} has no mask token: set "mask_token" in its '
            "tokenizer_config.json to the token that stands for a hidden one"
        )
    tokenizer.mask_token = token


def _set_ends(
    tokenizer: "PreTrainedTokenizerBase",
    family: TokenizerFamily | None,
    fields: Mapping[str, Any],
) -> None:
    """Set the end-of-text and the padding token where the files of the tokenizer name none."""
    for kind in ("eos", "pad"):
        if getattr(tokenizer, f"{kind}_token_id") is not None:
            continue
        token = _token_of(tokenizer, fields.get(f"{kind}_token_id"))
        if token is None and family is not None and family.end_of_text in tokenizer.get_vocab():
            token = family.end_of_text
        if token is not None:
            setattr(tokenizer, f"{kind}_token", token)


def _token_of(tokenizer: "PreTrainedTokenizerBase", token_id: Any) -> str | None:
    """Return the token with the first of some ids that the tokenizer has."""
    for one in _as_list(token_id):
        if isinstance(one, int) and 0 <= one < len(tokenizer):
            return str(tokenizer.convert_ids_to_tokens(one))
    return None


def _as_list(token_id: Any) -> list[Any]:
    ids = token_id if isinstance(token_id, list) else [token_id]
    return [one for one in ids if one is not None]
