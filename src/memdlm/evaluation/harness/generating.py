"""Generation requests of one call: read, checked, and answered in batches."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memdlm.evaluation.harness.answering import Job
from memdlm.evaluation.harness.requests import (
    Generation,
    Tokens,
    read_generation,
    request_seed,
)
from memdlm.evaluation.harness.response_cache import Answer, answer_key
from memdlm.evaluation.harness.subject import AnswerRecord, Subject, where_of
from memdlm.inference import generate

# What an inner step costs, in forwards: it runs forwards and backwards.
_INNER_STEP = 3


@dataclass(frozen=True)
class _Asked:
    """One request as it will be answered; `occurrence` counts its likes that came before."""

    generation: Generation
    prompt: Tokens
    occurrence: int


class GenerationRound:
    """The `generate_until` requests of one call.

    Attributes:
        name: What lm-eval calls such requests.
        jobs: One per request, for `Answering`.
        rows: Rows of a forward; None for those of a batch.
    """

    name = "generate_until"
    rows: int | None = None

    def __init__(self, subject: Subject, requests: Sequence[Any]) -> None:
        """Read lm-eval's instances, with arguments (prompt, generation arguments).

        Raises:
            DataError: A prompt is empty or does not fit.
            UsageError: Generation arguments are unknown or out of range.
        """
        self.subject = subject
        self._facts: dict[Generation, dict[str, Any]] = {}
        seen: Counter[tuple[str, Generation]] = Counter()
        self._asked = []
        for number, request in enumerate(requests, start=1):
            text, arguments = request.args
            generation = read_generation(arguments, subject.sampling)
            num_new = generation.sampling.max_new_tokens
            prompt = subject.fit(subject.encode(text), num_new, where_of(request, number))
            occurrence = seen[prompt.sha256, generation]
            seen[prompt.sha256, generation] += 1
            self._asked.append(_Asked(generation, prompt, occurrence))
        self.jobs = [self._job(asked) for asked in self._asked]

    def _job(self, asked: _Asked) -> Job:
        sampling, prompt = asked.generation.sampling, asked.prompt
        if asked.generation not in self._facts:  # thousands of requests share theirs
            self._facts[asked.generation] = {
                "sampling": asdict(sampling),
                "memory": self.subject.memory_facts(),
                "seed": self.subject.seed,
                "until": asked.generation.until,
            }
        facts = {**self._facts[asked.generation], "occurrence": asked.occurrence}
        length = len(prompt) + sampling.max_new_tokens
        steps = sampling.max_new_tokens
        if sampling.num_unmasking_steps is not None:
            steps = min(steps, sampling.num_unmasking_steps)
        work = length * steps * (2 if sampling.guidance_scale else 1)
        memory = self.subject.memory
        if memory is not None:
            work += _INNER_STEP * memory.num_steps * memory.num_epochs * len(prompt)
        return Job(
            key=answer_key(self.subject.settings, self.name, [prompt.sha256], facts),
            length=length,
            work=work,
            prompt_tokens=len(prompt),
            new_tokens=sampling.max_new_tokens,
            kind=asked.generation,
        )

    def compute(self, places: Sequence[int], divisor: int) -> list[Answer]:
        """Answer the requests at `places`, which want it alike; see `Answering`."""
        subject, chosen = self.subject, [self._asked[place] for place in places]
        answers = generate(
            subject.model,
            subject.tokenizer,
            [asked.prompt.tensor() for asked in chosen],
            chosen[0].generation.sampling,
            subject.memory,
            objective=subject.objective,
            seed=self._seeds("memory", chosen),
            sampling_seeds=self._seeds("sampling", chosen),
            batch_size=math.ceil(len(chosen) / divisor),
            max_memory_bytes=subject.max_memory_bytes,
            stop_strings=chosen[0].generation.until,
        )
        return [
            {"text": answer.text, "num_tokens": len(answer.token_ids), "memory": answer.memory}
            for answer in answers
        ]

    def _seeds(self, stream: str, chosen: Sequence[_Asked]) -> list[int]:
        own = (asked.generation.sampling.seed for asked in chosen)
        return [
            request_seed(self.subject.seed, stream, asked.prompt.sha256, asked.occurrence, seed)
            for asked, seed in zip(chosen, own, strict=True)
        ]

    def records(self, answers: Sequence[Answer]) -> list[AnswerRecord]:
        """Return one record per request, from the answers to `jobs`."""
        return [
            AnswerRecord(
                prompt_sha256=asked.prompt.sha256,
                num_prompt_tokens=len(asked.prompt),
                num_dropped_tokens=asked.prompt.num_dropped,
                num_new_tokens=answer["num_tokens"],
                memory=answer["memory"],
                response=answer["text"],
            )
            for asked, answer in zip(self._asked, answers, strict=True)
        ]
