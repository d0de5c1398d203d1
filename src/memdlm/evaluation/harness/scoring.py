"""Likelihood requests of one call: continuations of contexts, or whole texts, scored in batches.

A memory is written from a context alone, once for all its continuations.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from memdlm.data.encoding import uses_template
from memdlm.errors import DataError, UsageError
from memdlm.evaluation.harness.answering import Job
from memdlm.evaluation.harness.likelihood import likelihood_bounds
from memdlm.evaluation.harness.requests import Tokens, encode, ids_hash, request_seed
from memdlm.evaluation.harness.response_cache import Answer, answer_key
from memdlm.evaluation.harness.subject import AnswerRecord, Subject, where_of
from memdlm.inference import generate
from memdlm.memory.budget import COPIES_WHILE_WRITING, memory_bytes, rows_within
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.canvas import prompt_canvas
from memdlm.sampling.config import SamplingConfig


@dataclass(frozen=True)
class _Pair:
    """One continuation to score; `occurrence` counts its likes that came before."""

    context: Tokens
    continuation: Tokens
    occurrence: int

    @property
    def unit(self) -> tuple[Tokens, int]:
        """What pairs share that share a memory."""
        return self.context, self.occurrence


class LikelihoodRound:
    """The `loglikelihood` requests of one call, or its `loglikelihood_rolling` requests.

    A rolling request is a whole text. It is scored in windows of the context, one behind the other,
    each given the token before it; the first is given the token that opens or ends a text.

    lm-eval wants to know of every continuation whether the model would write it itself, also where
    no metric of a task needs it. Continuations of one context and length share that decode, so that
    choices of one token take one forward more, all together.

    Attributes:
        name: What lm-eval calls such requests.
        jobs: One per continuation, for `Answering`.
        rows: Rows of a forward.
    """

    def __init__(self, subject: Subject, requests: Sequence[Any], name: str) -> None:
        """Read lm-eval's instances, with arguments (context, continuation) or (text,).

        Raises:
            DataError: A continuation is empty, or does not fit.
            UsageError: There is no context to write the memory from.
        """
        self.subject, self.name = subject, name
        self.rows: int | None = subject.likelihood.batch_size
        self._checks_greedy = name == "loglikelihood"
        seen: Counter[tuple[Tokens, Tokens]] = Counter()
        self._pairs: list[_Pair] = []
        # For each request the places of its pairs.
        self._spans: list[range] = []
        read = self._read_pair if self._checks_greedy else self._read_windows
        for number, request in enumerate(requests, start=1):
            where = where_of(request, number)
            start = len(self._pairs)
            for context, continuation in read(request.args, where):
                occurrence = seen[context, continuation]
                seen[context, continuation] += 1
                self._pairs.append(_Pair(context, continuation, occurrence))
            self._spans.append(range(start, len(self._pairs)))
        self.jobs = [self._job(pair) for pair in self._pairs]

    def _read_pair(self, arguments: tuple[str, str], where: str) -> list[tuple[Tokens, Tokens]]:
        """Return the ids of context and continuation, parted as lm-eval does it."""
        context, continuation = arguments
        tokenizer = self.subject.tokenizer
        if not context:
            self._refuse_memory(f"{where} has no context")
            before, ids = self._prefix(encode(tokenizer, continuation))
        elif uses_template(tokenizer, self.subject.chat_template):
            before = self.subject.encode(context)
            ids = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        else:
            # Spaces belong to the word that follows them.
            stripped = context.rstrip()
            before = encode(tokenizer, stripped)
            ids = encode(tokenizer, context + continuation)[len(before) :]
        if not ids:
            raise DataError(f"{where}: the continuation {continuation!r} has no token of its own")
        return [(self.subject.fit(before, len(ids), where), Tokens.of(ids))]

    def _read_windows(self, arguments: tuple[str], where: str) -> list[tuple[Tokens, Tokens]]:
        self._refuse_memory("loglikelihood_rolling scores whole texts")
        (text,) = arguments
        before, ids = self._prefix(encode(self.subject.tokenizer, text))
        if not ids:
            raise DataError(f"{where}: the text is empty")
        size = self.subject.max_length - 1
        whole = [*before, *ids]
        return [
            (Tokens.of(whole[start : start + 1]), Tokens.of(whole[start + 1 : start + 1 + size]))
            for start in range(0, len(ids), size)
        ]

    def _prefix(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return a first token to stand for the empty context, and the ids behind it."""
        tokenizer = self.subject.tokenizer
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is not None and ids[:1] == [bos]:
            return ids[:1], ids[1:]
        return [eos if bos is None else bos], ids

    def _refuse_memory(self, why: str) -> None:
        if self.subject.memory is not None:
            raise UsageError(
                f"{why}, and a memory is written from the context: turn the memory off for this "
                "task"
            )

    def _job(self, pair: _Pair) -> Job:
        subject, size = self.subject, len(pair.continuation)
        facts = {
            "num_samples": subject.likelihood.num_samples,
            "mask_seed": subject.likelihood.seed,
            "memory": subject.memory_facts(),
            "seed": subject.seed,
            "occurrence": pair.occurrence,
            "greedy": self._greedy_sampling(size).decoder if self._checks_greedy else None,
        }
        num_samples = subject.likelihood.num_samples
        num_masks = num_samples if size > num_samples.bit_length() else 2**size - 1
        num_forwards = min(num_samples, num_masks) + (size if self._checks_greedy else 0)
        length = len(pair.context) + size
        return Job(
            key=answer_key(
                subject.settings,
                "likelihood",
                [pair.context.sha256, pair.continuation.sha256],
                facts,
            ),
            length=length,
            work=length * num_forwards,
            prompt_tokens=len(pair.context),
            new_tokens=size,
            unit=pair.unit,
        )

    def compute(self, places: Sequence[int], divisor: int) -> list[Answer]:
        """Score the pairs at `places`; see `Answering`."""
        subject, pairs = self.subject, [self._pairs[place] for place in places]
        contexts = [pair.context.tensor() for pair in pairs]
        continuations = [pair.continuation.tensor() for pair in pairs]
        writer = self._writer()
        most = self._most_memories(writer)
        memories = self._write(writer, pairs, min(most, math.ceil(len(pairs) / divisor)))
        bounds = likelihood_bounds(
            subject.model,
            contexts,
            continuations,
            subject.likelihood,
            seeds=[self._mask_seed(pair) for pair in pairs],
            memories=memories,
            batch_size=min(most, math.ceil(subject.likelihood.batch_size / divisor)),
        )
        greedy = self._check_greedy(pairs, contexts, memories, divisor, most)
        states = ["off" if m is None else _state(m) for m in memories]
        return [
            {
                "value": bound.value,
                "standard_error": bound.standard_error,
                "num_masks": bound.num_masks,
                "memory": state,
                "is_greedy": is_greedy,
            }
            for bound, state, is_greedy in zip(bounds, states, greedy, strict=True)
        ]

    def _mask_seed(self, pair: _Pair) -> int:
        sha256 = ids_hash([*pair.context.ids, *pair.continuation.ids])
        own = self.subject.likelihood.seed
        return request_seed(self.subject.seed, "masks", sha256, pair.occurrence, own)

    def _writer(self) -> ParametricMemory | None:
        subject = self.subject
        if subject.memory is None:
            return None
        config = replace(subject.memory, sharing="sequence")
        return ParametricMemory(subject.model, config, subject.objective)

    def _most_memories(self, writer: ParametricMemory | None) -> int:
        """Return how many rows may have a memory at once."""
        limit = self.subject.max_memory_bytes
        if writer is None or limit is None:
            return sys.maxsize
        return rows_within(
            limit, COPIES_WHILE_WRITING * memory_bytes(writer.placement, writer.config)
        )

    def _write(
        self, writer: ParametricMemory | None, pairs: Sequence[_Pair], size: int
    ) -> list[ParametricMemory | None]:
        """Return each pair's memory, written once for every context, `size` of them at a time."""
        if writer is None:
            return [None] * len(pairs)
        subject = self.subject
        own: Any = subject.model.config
        units = list(dict.fromkeys(pair.unit for pair in pairs))
        written: dict[Any, ParametricMemory] = {}
        for start in range(0, len(units), size):
            part = units[start : start + size]
            prompts = [context.tensor() for context, _ in part]
            canvas = prompt_canvas(
                prompts,
                0,
                own.mask_token_id,
                own.pad_token_id,
                next(subject.model.parameters()).device,
            )
            seeds = [
                request_seed(subject.seed, "memory", context.sha256, occurrence)
                for context, occurrence in part
            ]
            writer.write(canvas.tokens, canvas.attention_mask, seed=seeds)
            written |= {unit: writer.row(row) for row, unit in enumerate(part)}
            writer.erase()
        return [written[pair.unit] for pair in pairs]

    def _check_greedy(
        self,
        pairs: Sequence[_Pair],
        contexts: Sequence[torch.Tensor],
        memories: Sequence[ParametricMemory | None],
        divisor: int,
        most: int,
    ) -> list[bool | None]:
        """Return whether the model writes each continuation itself; None for whole texts."""
        if not self._checks_greedy:
            return [None] * len(pairs)
        # What a model writes depends on context and length: one decode for all that share both.
        firsts: dict[int, dict[Any, int]] = {}
        for place, pair in enumerate(pairs):
            firsts.setdefault(len(pair.continuation), {}).setdefault(pair.unit, place)
        written: dict[tuple[Any, int], tuple[int, ...]] = {}
        for size, places in firsts.items():
            answers = generate(
                self.subject.model,
                self.subject.tokenizer,
                [contexts[place] for place in places.values()],
                self._greedy_sampling(size),
                memories=[memories[place] for place in places.values()],
                batch_size=min(most, math.ceil(len(places) / divisor)),
            )
            for unit, answer in zip(places, answers, strict=True):
                written[unit, size] = answer.token_ids
        return [
            written[pair.unit, len(pair.continuation)] == tuple(pair.continuation.ids)
            for pair in pairs
        ]

    def _greedy_sampling(self, size: int) -> SamplingConfig:
        """Return LLaDA's greedy suffix: the surest token in each step, all of them kept."""
        decoder = self.subject.sampling.decoder
        return SamplingConfig(max_new_tokens=size, stop_at_eos=False, decoder=decoder)

    def records(self, answers: Sequence[Answer]) -> list[AnswerRecord]:
        """Return one record per request, from the answers to `jobs`."""
        return [
            _record([self._pairs[i] for i in span], [answers[i] for i in span])
            for span in self._spans
        ]


def _state(memory: ParametricMemory) -> str:
    row = memory.rows[0]
    return "dropped" if row is not None and row.is_dropped else "written"


def _record(pairs: Sequence[_Pair], answers: Sequence[Answer]) -> AnswerRecord:
    """Return the record of a request, from its only pair or from its windows, which add up."""
    return AnswerRecord(
        prompt_sha256=pairs[0].context.sha256,
        num_prompt_tokens=len(pairs[0].context),
        num_dropped_tokens=pairs[0].context.num_dropped,
        num_new_tokens=sum(len(pair.continuation) for pair in pairs),
        memory=answers[0]["memory"],
        log_likelihood=sum(answer["value"] for answer in answers),
        standard_error=math.hypot(*(answer["standard_error"] for answer in answers)),
        is_greedy=answers[0]["is_greedy"],
    )
