"""Who is asked, and what is kept of every answer. Knows no benchmark and no batching."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from memdlm.data.encoding import encode_prompt, uses_template
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.evaluation.harness.likelihood import LikelihoodConfig
from memdlm.evaluation.harness.requests import Tokens, encode, fit_prompt
from memdlm.memory.config import MemoryConfig
from memdlm.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """A model, and everything beside the request that decides its answers.

    Attributes:
        model: A backbone, possibly wrapped.
        tokenizer: The model's.
        sampling: How it answers, where the request says nothing else.
        memory: Write a memory from each prompt; None for none.
        objective: Noise schedule of the memory's anchor.
        likelihood: How continuations are scored.
        seed: The evaluation's.
        max_length: Tokens of prompt and answer together, at most.
        truncation: What becomes of longer prompts: `error` or `middle`.
        chat_template: `never`, or `auto` to make every prompt one user turn.
        settings: Fingerprint of the model, part of every key of the response cache.
        max_memory_bytes: Most that the memories of a batch may take; None for no limit.
    """

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    sampling: SamplingConfig
    memory: MemoryConfig | None
    objective: ObjectiveConfig
    likelihood: LikelihoodConfig
    seed: int
    max_length: int
    truncation: str
    chat_template: str
    settings: str
    max_memory_bytes: int | None = None

    def memory_facts(self) -> dict[str, Any] | None:
        """Return the settings of the memory, None without one."""
        if self.memory is None:
            return None
        return {"memory": asdict(self.memory), "objective": asdict(self.objective)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, a user turn where the chat template is used."""
        if uses_template(self.tokenizer, self.chat_template):
            return encode_prompt(self.tokenizer, text, chat_template=self.chat_template)
        return encode(self.tokenizer, text)

    def fit(self, ids: Sequence[int], num_new_tokens: int, where: str) -> Tokens:
        """Return a prompt that fits; errors as `fit_prompt`."""
        return fit_prompt(ids, num_new_tokens, self.max_length, self.truncation, where)


@dataclass(frozen=True)
class AnswerRecord:
    """One answer, with what lm-eval does not keep of it.

    Attributes:
        prompt_sha256: Of the prompt's token ids, as the model has read them (`ids_hash`).
        num_prompt_tokens: How many they are.
        num_dropped_tokens: Tokens taken out of the prompt's middle to make it fit.
        num_new_tokens: Tokens generated or scored.
        memory: `off`, `written`, or `dropped` where the inner loop met inf or nan.
        response: What was generated, cut at the first stop string; None for a likelihood.
        log_likelihood: Bound in nats; None for a generation.
        standard_error: Of the bound; 0 where it is exact.
        is_greedy: Whether the model writes this continuation itself, taking the surest token in
            each step; None for a generation and for a whole text.
    """

    prompt_sha256: str
    num_prompt_tokens: int
    num_dropped_tokens: int
    num_new_tokens: int
    memory: str
    response: str | None = None
    log_likelihood: float | None = None
    standard_error: float | None = None
    is_greedy: bool | None = None


def where_of(request: Any, number: int) -> str:
    """Return how an error names a request of lm-eval, the `number`-th from 1."""
    if request.task_name is None:
        return f"request {number}"
    return f"{request.task_name}, document {request.doc_id}"
