"""What a benchmark asks of `generate_until`, read and checked: prompt ids, settings, stop strings.

The words of lm-eval (`max_gen_toks`, `do_sample`, ...) become a `SamplingConfig`; a word that would
do nothing is an error. Knows no model, only the tokenizer and the length of a context.
"""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memdlm.data.encoding import encode_prompt
from memdlm.errors import ConfigError, DataError, UsageError
from memdlm.sampling.config import SamplingConfig
from memdlm.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATIONS = ("error", "middle")

# Names that other model classes of lm-eval take for the number of new tokens.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OWN = ("until", "do_sample", "temperature", "num_beams", *_LENGTHS)
# Decided elsewhere, or of no meaning for a prompt that is answered.
_NOT_A_REQUEST = ("seed", "infill", "max_new_tokens", "temperature")
_SAMPLING = tuple(f.name for f in fields(SamplingConfig) if f.name not in _NOT_A_REQUEST)


@dataclass(frozen=True)
class Generation:
    """How a request wants its answer.

    Attributes:
        sampling: Settings of the decode.
        until: Strings that end the answer, which is cut before the first.
    """

    sampling: SamplingConfig
    until: tuple[str, ...]


@dataclass(frozen=True)
class Tokens:
    """Token ids as the model reads them; those of one hash count as the same.

    Thousands of long prompts are held at once, which Python's own numbers would make too large.

    Attributes:
        ids: [L] int32.
        sha256: `ids_hash` of them.
        num_dropped: Tokens that `middle` truncation has taken out.
    """

    ids: np.ndarray = field(compare=False, repr=False)
    sha256: str
    num_dropped: int = 0

    @classmethod
    def of(cls, ids: Sequence[int], num_dropped: int = 0) -> "Tokens":
        """Hold token ids."""
        return cls(np.asarray(ids, dtype=np.int32), ids_hash(ids), num_dropped)

    def __len__(self) -> int:
        return len(self.ids)

    def tensor(self) -> torch.Tensor:
        """Return the ids [L] int64."""
        return torch.from_numpy(self.ids.astype(np.int64))


def read_generation(arguments: Mapping[str, Any], sampling: SamplingConfig) -> Generation:
    """Return what the generation arguments of a request ask for, on top of `sampling`.

    `max_gen_toks`, or what other models call it, is the length of the answer, by default that of
    `sampling`. As elsewhere in lm-eval, an answer is sampled where `do_sample` is true or, without
    it, `temperature` above 0; `do_sample` alone samples at `sampling.temperature`, or 1. Any other
    setting of `SamplingConfig` may be named as well.

    Raises:
        UsageError: A name is unknown, a value out of range, or the task asks for greedy decoding
            while `sampling` does not.
    """
    known = set(_OWN) | set(_SAMPLING)
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(_OWN)}"
            raise UsageError(f"generation_kwargs: {name} is not known to memdlm; {hint}")
    if arguments.get("num_beams") not in (None, 1):
        raise UsageError(
            f"generation_kwargs: num_beams={arguments['num_beams']}: there are no beams in masked "
            "decoding; use 1"
        )
    changes = {name: arguments[name] for name in _SAMPLING if name in arguments}
    length = next((arguments[n] for n in _LENGTHS if arguments.get(n) is not None), None)
    if length is not None:
        changes["max_new_tokens"] = length
    changes["temperature"] = _temperature(arguments, sampling)
    if not changes["temperature"]:
        for name in ("top_k", "top_p"):  # meaningless where the best token is taken
            changes.pop(name, None)
    try:
        return Generation(replace(sampling, **changes), _until(arguments.get("until")))
    except ConfigError as error:
        raise UsageError(f"generation_kwargs {dict(arguments)}: {error}") from error


def _temperature(arguments: Mapping[str, Any], sampling: SamplingConfig) -> float:
    given = arguments.get("temperature")
    do_sample = arguments.get("do_sample")
    if do_sample not in (None, True, False):
        raise UsageError(f"generation_kwargs: do_sample={do_sample!r}: use true or false")
    if do_sample is False or (do_sample is None and given is not None and not given):
        if sampling.temperature:
            raise UsageError(
                f"sampling.temperature is {sampling.temperature}, but the task asks for greedy "
                "decoding: set sampling.temperature to 0, or do_sample to true in the task's "
                "generation_kwargs"
            )
        return 0.0
    if given is not None:
        temperature: float = given  # checked by SamplingConfig
        return temperature
    if do_sample:
        return sampling.temperature or 1.0
    return sampling.temperature


def _until(given: Any) -> tuple[str, ...]:
    stops = [] if given is None else [given] if isinstance(given, str) else list(given)
    if not all(isinstance(stop, str) for stop in stops):
        raise UsageError(f"generation_kwargs: until={given!r}: give strings")
    return tuple(stop for stop in stops if stop)


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the ids of a raw prompt, which opens as the tokenizer opens every text.

    A text that spells the begin-of-text token itself, as one from a chat template may, gets no
    second one.
    """
    ids = encode_prompt(tokenizer, text, chat_template="never")
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def fit_prompt(
    ids: Sequence[int], num_new_tokens: int, max_length: int, truncation: str, where: str
) -> Tokens:
    """Return a prompt that with its answer keeps to `max_length` tokens.

    `middle` keeps the first and the last half of what there is room for, as LongBench's evaluation
    does (arXiv 2308.14508, there by way of text, so that the tokens at the seam may differ).

    Raises:
        DataError: The prompt is empty or, with truncation `error`, too long; or there is room for
            no prompt at all. Names the request by `where`.
    """
    if not ids:
        raise DataError(f"{where} is an empty prompt: give it at least one token")
    room = max_length - num_new_tokens
    if len(ids) <= room:
        return Tokens.of(ids)
    if truncation == "error" or room < 2:
        raise DataError(
            f"{where}: the prompt of {len(ids):,} tokens and {num_new_tokens:,} new ones exceed "
            f"the context of {max_length:,} tokens: use shorter documents or a model with a longer "
            "context" + ("" if room < 2 else ", or truncation `middle`")
        )
    first = room // 2
    return Tokens.of([*ids[:first], *ids[len(ids) - (room - first) :]], len(ids) - room)


def ids_hash(ids: Sequence[int]) -> str:
    """Return the SHA-256 of token ids as little-endian int64, in hex."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()


def request_seed(seed: int, stream: str, prompt_sha256: str, *indices: int) -> int:
    """Return the seed of one request: of its prompt, not of its place among the others.

    Args:
        seed: The evaluation's.
        stream: What is drawn, `memory`, `sampling` or `masks`.
        prompt_sha256: `ids_hash` of the prompt.
        indices: How often the same request came before, and what else tells draws apart.
    """
    return derive_seed(seed, f"evaluation_{stream}/{prompt_sha256}", *indices)
