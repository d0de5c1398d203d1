"""lm-eval's model interface, answered by a masked diffusion model with a memory per request.

Importing this file registers `memdlm` with lm-eval, so all three work:

    lm_eval.simple_evaluate(model="memdlm", model_args="pretrained=run,memory=on", tasks=[...])
    lm_eval.evaluate(lm=DiffusionLM(model, tokenizer, memory=MemoryConfig()), task_dict=...)
    DiffusionLM(model, tokenizer, ...).answer(requests)   # with what lm-eval drops: AnswerRecord

An answer depends on the model, the settings, the evaluation's seed and its own prompt, and on how
often the same request came before. It does not depend on the batch, on the other requests, on the
process that computes it, or on a restart.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import nn

from memdlm.data.config import CHAT_TEMPLATE
from memdlm.diffusion.objective import ObjectiveConfig
from memdlm.errors import ConfigError, UsageError
from memdlm.evaluation.harness.answering import Answering
from memdlm.evaluation.harness.arguments import (
    fingerprint,
    load,
    memory_setting,
    settings_hash,
    with_assignments,
)
from memdlm.evaluation.harness.generating import GenerationRound
from memdlm.evaluation.harness.likelihood import LikelihoodConfig
from memdlm.evaluation.harness.progress import OnProgress, ProgressReport
from memdlm.evaluation.harness.requests import TRUNCATIONS
from memdlm.evaluation.harness.response_cache import ResponseCache
from memdlm.evaluation.harness.scoring import LikelihoodRound
from memdlm.evaluation.harness.sharding import Shard
from memdlm.evaluation.harness.subject import AnswerRecord, Subject
from memdlm.memory.config import MemoryConfig
from memdlm.sampling.config import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GATHERS = ("first", "all")


@register_model("memdlm")
class DiffusionLM(LM):
    """A masked diffusion model as lm-eval sees it.

    `loglikelihood` gives the Monte-Carlo bound of `memdlm.evaluation.harness.likelihood`. lm-eval
    keeps neither its standard error nor the state of a memory: both are in the record that
    `answer` returns, and in `records` after a call of lm-eval's.

    lm-eval sees one process, however many share the requests (`shard`): each of them is given all
    requests and answers its share, and the response cache brings the answers together.

    Attributes:
        records: The record of every answer so far: (task, document, place among the document's
            requests) -> records in the order of repeats.
    """

    def __init__(
        self,
        pretrained: str | Path | nn.Module,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        *,
        adapter: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        attention: str | None = None,
        device: str | None = None,
        sampling: SamplingConfig | None = None,
        memory: MemoryConfig | str | bool | None = None,
        objective: ObjectiveConfig | None = None,
        likelihood: LikelihoodConfig | None = None,
        seed: int = 0,
        batch_size: int | str = 8,
        batch_tokens: int | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_memory_bytes: int | None = None,
        truncation: str = "error",
        chat_template: str = "never",
        cache: ResponseCache | str | Path | None = None,
        settings: Mapping[str, Any] | str | None = None,
        shard: Shard | str | None = None,
        gather: str | None = None,
        wait_seconds: float = 3600.0,
        say: Callable[[str], None] | None = None,
        on_progress: OnProgress | None = None,
        **assignments: Any,
    ) -> None:
        """Take a loaded model with its tokenizer, or load one by name.

        Args:
            pretrained: A backbone, possibly wrapped; or what `load_model` takes.
            tokenizer: The model's; None to load it by the same name.
            adapter: With a name, PEFT adapter to put on the model.
            dtype: With a name, type of the weights.
            quantization: With a name, `nf4` for 4 bits.
            attention: With a name, what `load_model` takes.
            device: With a name, where the model goes; by default this process's accelerator.
            sampling: How answers are decoded; a task's generation arguments go before.
            memory: Settings of the memory, or `on` (the paper's, whatever a run folder was trained
                with) or `off` (the default).
            objective: Noise schedule of the memory's anchor.
            likelihood: How continuations are scored.
            seed: Decides every memory, sample and mask, each with its prompt.
            batch_size: Most requests of a batch.
            batch_tokens: Most tokens of a batch, padding included.
            max_batch_size: lm-eval's; must be None.
            max_length: Tokens of prompt and answer; the model's context by default.
            max_memory_bytes: Most that the memories of one batch may take.
            truncation: `error`, or `middle` to cut longer prompts as LongBench does.
            chat_template: `never` for raw prompts, as the paper evaluates, or `auto` to make each
                prompt a user turn. lm-eval's own `apply_chat_template` needs `never`.
            cache: Folder of the response cache, or an open one; None to keep no answers.
            settings: Identity of the model, for the cache: JSON, or a text. Computed by default.
            shard: This process's share; `1/4` and `environment` (torchrun's) in words.
            gather: `first`: process 0 waits for the answers of all and returns them, the others
                raise `ShareDone` in place of returning. `all`: every process waits. By default
                `first` for a model that is given, `all` for one that lm-eval loads by name.
            wait_seconds: How long to wait without news of the other processes.
            say: Told what a user should know, e.g. that batches had to be halved.
            on_progress: Told of the start and of every batch, in numbers.
            **assignments: `sampling.KEY`, `memory.KEY`, `objective.KEY` and `likelihood.KEY`.

        Raises:
            UsageError: An argument is unknown or does not fit the others.
            ConfigError: A value is out of range.
            CheckpointError, DataError: The model or the cache cannot be read.
        """
        super().__init__()
        is_given = isinstance(pretrained, nn.Module)
        self._check(batch_size, max_batch_size, truncation, chat_template)
        configs = with_assignments(
            {
                "sampling": sampling or SamplingConfig(),
                "memory": memory_setting(memory),
                "objective": objective or ObjectiveConfig(),
                "likelihood": likelihood or LikelihoodConfig(),
            },
            assignments,
        )
        if gather is None:
            gather = "first" if is_given else "all"
        if gather not in GATHERS:
            raise ConfigError(f"gather: {gather!r} is not one of {', '.join(GATHERS)}")
        model: nn.Module
        if isinstance(pretrained, nn.Module):
            if tokenizer is None:
                raise UsageError("a model that is given needs its tokenizer")
            if dtype != "auto" or any((adapter, quantization, attention, device)):
                raise UsageError(
                    "adapter, dtype, quantization, attention and device say how to load a model by "
                    "name; this one is loaded"
                )
            model = pretrained
        else:
            model, loaded = load(
                str(pretrained),
                adapter=adapter,
                dtype=dtype,
                quantization=quantization,
                attention=attention,
                device=device,
            )
            tokenizer = loaded if tokenizer is None else tokenizer
        place = Shard.parse(shard) if isinstance(shard, str) else shard or Shard()
        if isinstance(cache, str | Path):
            cache = ResponseCache(cache, place)
        if cache is not None and settings is None:
            settings = fingerprint(model, tokenizer)
        self._answering = Answering(
            batch_size=int(batch_size),
            batch_tokens=batch_tokens,
            cache=cache,
            shard=place,
            gathers=gather == "all" or place.index == 0,
            wait_seconds=wait_seconds,
            say=say or (lambda line: None),
            on_progress=on_progress,
        )
        written: MemoryConfig = configs["memory"]
        self.subject = Subject(
            model=model,
            tokenizer=tokenizer,
            sampling=configs["sampling"],
            memory=written if written.enabled else None,
            objective=configs["objective"],
            likelihood=configs["likelihood"],
            seed=seed,
            max_length=self._max_length(model, max_length),
            truncation=truncation,
            chat_template=chat_template,
            settings=settings_hash(settings or ""),
            max_memory_bytes=max_memory_bytes,
        )
        self._device = next(model.parameters()).device
        self.tokenizer = tokenizer
        self.records: dict[tuple[str | None, int | None, int], list[AnswerRecord]] = {}

    @staticmethod
    def _check(
        batch_size: int | str,
        max_batch_size: int | None,
        truncation: str,
        chat_template: str,
    ) -> None:
        for name, value, choices in (
            ("truncation", truncation, TRUNCATIONS),
            ("chat_template", chat_template, CHAT_TEMPLATE),
        ):
            if value not in choices:
                raise ConfigError(f"{name}: {value!r} is not one of {', '.join(choices)}")
        if max_batch_size is not None or not str(batch_size).isdigit():
            raise UsageError(
                "batch_size: give a number (batches that exceed the device's memory are halved); "
                "there is no automatic one, and no max_batch_size"
            )

    @staticmethod
    def _max_length(model: nn.Module, wanted: int | None) -> int:
        own: Any = model.config
        context: int = own.max_position_embeddings
        if wanted is not None and not 1 < wanted <= context:
            raise ConfigError(
                f"max_length: {wanted} is not between 2 and the model's context of {context:,}"
            )
        return context if wanted is None else wanted

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the answers besides the model and the requests, as JSON."""
        subject = self.subject
        likelihood = asdict(subject.likelihood)
        del likelihood["batch_size"]  # decides no answer
        facts = {
            "sampling": asdict(subject.sampling),
            "memory": None if subject.memory is None else asdict(subject.memory),
            "objective": asdict(subject.objective),
            "likelihood": likelihood,
            "seed": subject.seed,
            "max_length": subject.max_length,
            "truncation": subject.truncation,
            "chat_template": subject.chat_template,
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain

    def answer(self, requests: Sequence[Any]) -> list[AnswerRecord]:
        """Answer lm-eval's instances of one request type; a record each, in order.

        Raises:
            DataError: A prompt or continuation is empty or does not fit, named by its task and
                document; or other processes have failed. Found before anything is computed.
            UsageError: The arguments of a request are unknown or out of range.
            ShareDone: This process has done its share, and another one gathers the answers.
        """
        if not requests:
            return []
        asked = self._round(requests)
        answers = self._answering.run(asked.name, asked.jobs, asked.compute, asked.rows)
        records = asked.records(answers)
        for request, record in zip(requests, records, strict=True):
            key = (request.task_name, request.doc_id, request.idx)
            self.records.setdefault(key, []).append(record)
        return records

    def plan(self, requests: Sequence[Any]) -> list[ProgressReport]:
        """Return what answering would take, by type of request, computing nothing.

        Raises:
            DataError, UsageError: As `answer`.
        """
        types = dict.fromkeys(request.request_type for request in requests)
        parts = [[r for r in requests if r.request_type == name] for name in types]
        asked = [self._round(part) for part in parts]
        return [self._answering.start(one.name, one.jobs) for one in asked]

    def _round(self, requests: Sequence[Any]) -> GenerationRound | LikelihoodRound:
        name = requests[0].request_type
        if name == "generate_until":
            return GenerationRound(self.subject, requests)
        return LikelihoodRound(self.subject, requests, name)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the text of every answer, cut at the first stop string; lm-eval's method."""
        return [str(record.response) for record in self.answer(requests)]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return every continuation's bound, and whether it is greedy; lm-eval's method."""
        return [(_value(record), bool(record.is_greedy)) for record in self.answer(requests)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Return the bound of every text, in windows of the context; lm-eval's method."""
        return [_value(record) for record in self.answer(requests)]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as one text; lm-eval's method.

        Raises:
            UsageError: The tokenizer has no template, or `chat_template` is `auto` already.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError("the tokenizer has no chat template: leave out apply_chat_template")
        if self.subject.chat_template != "never":
            raise UsageError(
                "apply_chat_template and chat_template=auto would apply the template twice: "
                "leave one of them out"
            )
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that `apply_chat_template` uses; lm-eval's method."""
        return getattr(self.tokenizer, "chat_template", None) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer for lm-eval's own cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results."""
        return {"memdlm": self.settings}


def _value(record: AnswerRecord) -> float:
    assert record.log_likelihood is not None
    return record.log_likelihood
