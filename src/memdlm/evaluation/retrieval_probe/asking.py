"""In-weight retrieval: what a memory still answers when the needle cannot be looked up any more.

The paper says that a memory written from a prompt retrieves from the weights; a score cannot tell,
since the prompt is there as well. So the same questions are asked with the way to the needle cut:

    normal           nothing is cut
    answer_blocked   the answer's rows cannot look at the needle (`BlockedAttention`, `answer`)
    all_blocked      no row outside of the needle can (`all`): nothing but the weights knows it
    question_only    the document is gone, the question alone is asked

each without a memory and with one, which was always written from the whole prompt. What is right in
`all_blocked` with the memory and wrong without it came from the weights. A needle is what a sample
names as its evidence, wherever that occurs in the prompt.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memdlm.data.encoding import Example, columns_of, encode_prompt, uses_template
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError, DataError
from memdlm.evaluation.retrieval_probe.answer_likelihood import answer_nll
from memdlm.evaluation.retrieval_probe.blocked_attention import BlockedAttention
from memdlm.evaluation.samples import Sample
from memdlm.inference import generate
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.canvas import prompt_canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Condition -> the scope of `BlockedAttention`; None where nothing is cut.
CONDITIONS: dict[str, str | None] = {
    "normal": None,
    "answer_blocked": "answer",
    "all_blocked": "all",
    "question_only": None,
}


@dataclass(frozen=True)
class ProbeItem:
    """A sample as one model reads it.

    Attributes:
        sample: Its texts.
        prompt: Ids of the whole prompt [L] int64.
        needle: Which of them are evidence [L] bool; at least one.
        question: Ids of the prompt without its document [Q] int64; None if it is not asked so.
        response: Ids of the right answer with its end [R] int64.
        seed: Decides its memory and the order of its likelihood.
    """

    sample: Sample
    prompt: Tensor
    needle: Tensor
    question: Tensor | None
    response: Tensor
    seed: int


@dataclass(frozen=True)
class Answered:
    """How one sample was answered in one condition.

    Attributes:
        exact: 1.0 if the response is the right one word for word (in any order where that counts).
        recall: Share of the sample's answers that the response holds, in [0, 1].
        nll: Bound on the negative log-likelihood of the right response, nats per token.
        response: What was decoded.
        memory: `off`, `kept`, or `dropped` where its inner loop met inf or nan.
    """

    exact: float
    recall: float
    nll: float
    response: str
    memory: str

    def as_plain(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


def make_items(
    samples: Sequence[Sample],
    encoded: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat_template: str,
    needs_question: bool,
    seed: int,
) -> list[ProbeItem]:
    """Find every sample's needle among its tokens.

    Args:
        samples: What is asked.
        encoded: Their ids, as `encode_samples` gives them.
        tokenizer: The model's.
        chat_template: As they were encoded.
        needs_question: Whether `question_only` is asked.
        seed: A sample's own seed depends on it and on the sample's place.

    Raises:
        DataError: A sample says nothing of its evidence or its question, its evidence is not in the
            prompt, or the tokenizer cannot tell where. Names the row.
    """
    templated = uses_template(tokenizer, chat_template)
    items = []
    for index, (sample, example) in enumerate(zip(samples, encoded, strict=True)):
        dialogue = sample.dialogue
        if not sample.evidence:
            raise DataError(
                f"{dialogue.where} has no `evidence`: name the text of the prompt that the answer "
                "follows from, or a list of such texts"
            )
        if needs_question and sample.question is None:
            raise DataError(
                f"{dialogue.where} has no `question`: give the prompt without its document, or "
                "name the other conditions with --condition"
            )
        try:
            needle = columns_of(
                tokenizer,
                dialogue.messages if templated else dialogue.prompt,
                sample.evidence,
                chat_template=chat_template,
            )
        except DataError as error:
            raise DataError(f"{dialogue.where}, `evidence`: {error}") from error
        ids = torch.as_tensor(example.input_ids, dtype=torch.int64)
        question = None
        if needs_question and sample.question is not None:
            question = torch.tensor(
                encode_prompt(tokenizer, sample.question, chat_template=chat_template)
            )
        items.append(
            ProbeItem(
                sample=sample,
                prompt=ids[: example.prompt_length],
                needle=torch.tensor(needle),
                question=question,
                response=ids[example.prompt_length :],
                seed=derive_seed(seed, "retrieval_probe", index),
            )
        )
    return items


def probe_batch(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    items: Sequence[ProbeItem],
    conditions: Sequence[str],
    sampling: SamplingConfig,
    memory: MemoryConfig | None,
    objective: ObjectiveConfig | None = None,
) -> dict[str, list[Answered]]:
    """Ask a batch of questions in every condition.

    A sample's answers do not depend on the batch it is in.

    Args:
        model: A backbone, possibly wrapped.
        tokenizer: Its tokenizer.
        items: What is asked.
        conditions: Some of `CONDITIONS`.
        sampling: How answers are decoded; `max_new_tokens` is their length.
        memory: Write a memory from each whole prompt first; None or `enabled` off for none.
        objective: Noise schedule of the memory's anchor.

    Returns:
        Per condition one `Answered` per item.

    Raises:
        ConfigError: A condition is unknown.
        DataError: A needle cannot be blocked in this family.
    """
    for condition in conditions:
        if condition not in CONDITIONS:
            raise ConfigError(f"condition: {condition!r} is not one of {', '.join(CONDITIONS)}")
    written = _write(model, items, memory, objective)
    return {
        condition: _ask(model, tokenizer, items, condition, sampling, written)
        for condition in conditions
    }


def score_response(sample: Sample, response: str) -> tuple[float, float]:
    """Return exact match (0 or 1) and recall of the answers (0 to 1) of a decoded text.

    White space counts as one space. An answer is found where it stands between characters that
    continue no word.
    """
    text, expected = " ".join(response.split()), " ".join(sample.dialogue.response.split())
    found = 0
    for answer in sample.answers:
        words = re.escape(" ".join(answer.split()))
        found += re.search(rf"(?<!\w){words}(?!\w)", text) is not None
    exact = text == expected
    if sample.any_order:
        exact = found == len(sample.answers) and len(text.split()) == len(expected.split())
    return float(exact), found / len(sample.answers)


def _write(
    model: nn.Module,
    items: Sequence[ProbeItem],
    memory: MemoryConfig | None,
    objective: ObjectiveConfig | None,
) -> list[ParametricMemory] | None:
    """Return one memory per item, written from its whole prompt; None for none."""
    if memory is None or not memory.enabled:
        return None
    ids: Any = model.config
    device = next(model.parameters()).device
    prompts = [item.prompt for item in items]
    canvas = prompt_canvas(prompts, 0, ids.mask_token_id, ids.pad_token_id, device)
    writer = ParametricMemory(model, replace(memory, sharing="sequence"), objective)
    writer.write(canvas.tokens, canvas.attention_mask, seed=[item.seed for item in items])
    return [writer.row(row) for row in range(len(items))]


def _ask(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    items: Sequence[ProbeItem],
    condition: str,
    sampling: SamplingConfig,
    memories: list[ParametricMemory] | None,
) -> list[Answered]:
    """Answer all items in one condition, and score their right answers."""
    scope = CONDITIONS[condition]
    asked = model
    if scope is not None:
        asked = BlockedAttention(model, [item.needle for item in items], scope)
    prompts = [_prompt(item, condition) for item in items]
    answers = generate(
        asked, tokenizer, prompts, sampling, memories=memories, batch_size=len(items)
    )
    attached = nullcontext() if memories is None else ParametricMemory.stack(memories).attached()
    responses = [item.response for item in items]
    with attached:
        nll = answer_nll(asked, prompts, responses, [item.seed for item in items])
    found = []
    for item, answer, nats in zip(items, answers, nll, strict=True):
        exact, recall = score_response(item.sample, answer.text)
        per_token = nats / len(item.response)
        found.append(Answered(exact, recall, per_token, answer.text, answer.memory))
    return found


def _prompt(item: ProbeItem, condition: str) -> Tensor:
    if condition != "question_only":
        return item.prompt
    assert item.question is not None
    return item.question
