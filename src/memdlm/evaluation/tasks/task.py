"""What a benchmark task is: a row with a name, and a function that makes lm-eval's task from it.

Knows names and lengths (`ruler_vt@4k`), not what any task asks. lm-eval is imported only when a
task is built.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memdlm.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCE_SPLITTERS = ("punkt", "simple")


@dataclass(frozen=True)
class TaskSources:
    """Where data comes from that a task does not generate; unset is the hub.

    Raises:
        ConfigError: `sentences` is unknown.
    """

    babi: str | None = field(
        default=None,
        metadata={"help": "BABILong: folder of bAbI's English task files, in place of the hub."},
    )
    background: str | None = field(
        default=None,
        metadata={"help": "BABILong: plain-text book (UTF-8) that hides the facts; with `babi`."},
    )
    essays: str | None = field(
        default=None,
        metadata={
            "help": "RULER: plain text (UTF-8) that hides the needles of niah_single_2, _3, "
            "multikey_1, multivalue and multiquery, in place of the hub's essays."
        },
    )
    longbench: str | None = field(
        default=None,
        metadata={"help": "LongBench: folder of its JSON Lines files (trec.jsonl, ...)."},
    )
    sentences: str = field(
        default="punkt",
        metadata={
            "help": "How RULER splits essays into sentences: punkt (nltk's, as lm-eval; its data "
            "is downloaded once) or simple (at `.`, `?` and `!`; needs no data, other prompts)."
        },
    )

    def __post_init__(self) -> None:
        """Check the choice."""
        if self.sentences not in SENTENCE_SPLITTERS:
            raise ConfigError(
                f"sources.sentences: {self.sentences!r} is not one of "
                f"{', '.join(SENTENCE_SPLITTERS)}"
            )


@dataclass(frozen=True)
class TaskRequest:
    """What a task is built from.

    Attributes:
        name: The task's name with its length, `ruler_vt@4k`.
        tokenizer: The model's; tasks of a length in tokens are sized by it.
        length: Tokens of prompt and answer together (words for generated tasks); None for tasks
            whose documents have the length they have.
        num_samples: Documents, at most.
        seed: Of everything that is drawn.
        sources: Local data.
    """

    name: str
    tokenizer: "PreTrainedTokenizerBase"
    length: int | None
    num_samples: int
    seed: int
    sources: TaskSources


@dataclass(frozen=True)
class BenchmarkTask:
    """One row of the table of tasks.

    Attributes:
        build: Makes the config of lm-eval's `ConfigurableTask`.
        metrics: What `process_results` gives; the first is the one tables show.
        max_new_tokens: Length of an answer in tokens.
        num_samples: Documents of a full evaluation, as the paper counts them.
        shortest: Least length that can hold a document; None for tasks without a length.
        unit: What a length counts, `tokens` or `words`.
        hub: What would be fetched from the network with these sources; None if nothing.
        truncation: What happens to a prompt beyond the model's context: `error` or `middle`.
    """

    build: Callable[[TaskRequest], dict[str, Any]]
    metrics: tuple[str, ...]
    max_new_tokens: int
    num_samples: int
    shortest: int | None = None
    unit: str = "tokens"
    hub: Callable[[TaskSources], str | None] = lambda sources: None
    truncation: str = "error"

    @property
    def has_length(self) -> bool:
        """Whether a length is part of the task's name."""
        return self.shortest is not None


def split_name(name: str) -> tuple[str, int | None]:
    """Return the base and the length of a task's name: `ruler_vt@4k` is `ruler_vt`, 4096.

    Raises:
        UsageError: What follows the @ is no length.
    """
    base, at, text = name.partition("@")
    if not at:
        return base, None
    match = re.fullmatch(r"(\d+)(k?)", text)
    if match is None:
        raise UsageError(
            f"task {name}: {text!r} is no length; write tokens, or thousands as in {base}@4k"
        )
    return base, int(match[1]) * (1024 if match[2] else 1)


def length_label(length: int) -> str:
    """Return a length as names have it: 4096 is `4k`, 1536 is `1536`, 0 is `0k`."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def as_lm_eval_task(config: Mapping[str, Any]) -> Any:
    """Return lm-eval's task object of a config that `BenchmarkTask.build` made."""
    with_harness()
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config=dict(config))


def with_harness() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        UsageError: The extra `eval` is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("evaluation needs the extra `eval`: pip install 'memdlm[eval]'")
