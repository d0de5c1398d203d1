"""Load tokenizers, and hold a tokenizer and a model's config to the same token ids."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedConfig

from memdlm.backbones.adapters import base_of_adapter
from memdlm.backbones.reading import check_exists, readable
from memdlm.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Published tokenizers hold their mask token without saying that it is one.
KNOWN_MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>")

_TOKEN_IDS = ("mask_token_id", "pad_token_id", "eos_token_id")


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer and make sure that it knows its mask token.

    An adapter folder without tokenizer files lends that of its base model.

    Raises:
        CheckpointError: There is no readable tokenizer.
        DataError: The tokenizer has no mask token.
    """
    name = str(name_or_path)
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("tokenizer*")):
        name = base_of_adapter(folder)
    check_exists(name)
    with readable(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.mask_token_id is None:
        known = [token for token in KNOWN_MASK_TOKENS if token in tokenizer.get_vocab()]
        if not known:
            raise DataError(
                f'the tokenizer of {name} has no mask token: set "mask_token" in its '
                "tokenizer_config.json to the token that stands for a hidden one"
            )
        tokenizer.mask_token = known[0]
    return tokenizer


def match_token_ids(
    config: PreTrainedConfig, tokenizer: "PreTrainedTokenizerBase", name: str = "the model"
) -> None:
    """Give `config` the mask, padding and end-of-text ids it lacks, and refuse ids that differ.

    A default beyond the vocabulary counts as lacking: it belongs to the published sizes.

    Raises:
        CheckpointError: Model and tokenizer disagree about an id or the size of the vocabulary.
    """
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{name} has {config.vocab_size:,} token embeddings but the tokenizer "
            f"{len(tokenizer):,} tokens: use the tokenizer that belongs to the model"
        )
    for field in _TOKEN_IDS:
        ours, theirs = getattr(config, field), getattr(tokenizer, field)
        known = [i for i in (ours if isinstance(ours, list) else [ours]) if i is not None]
        known = [i for i in known if i < config.vocab_size]
        if theirs is None:
            continue
        if not known:
            setattr(config, field, theirs)
        elif theirs not in known:
            raise CheckpointError(
                f"{name}: config.json says {field} {ours}, the tokenizer says {theirs}: use the "
                f"tokenizer that belongs to the model, or correct {field} in config.json"
            )
