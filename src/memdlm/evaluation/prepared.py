"""A task made ready for one tokenizer: its documents, and the requests that lm-eval makes of them.

Two evaluations are comparable where the hashes here agree.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memdlm.errors import DataError, UsageError
from memdlm.evaluation.config import EvalConfig
from memdlm.evaluation.tasks.table import find_task
from memdlm.evaluation.tasks.task import BenchmarkTask, TaskRequest, as_lm_eval_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreparedTask:
    """What is asked of every arm that has this tokenizer.

    Attributes:
        name: The task with its length.
        row: Its row of the table.
        task: lm-eval's task.
        requests: lm-eval's instances, in the order of the documents.
        data_hash: SHA-256 of the documents, in hex.
        num_samples: Documents.
    """

    name: str
    row: BenchmarkTask
    task: Any
    requests: list[Any]
    data_hash: str
    num_samples: int


def prepare(
    name: str, tokenizer: "PreTrainedTokenizerBase", config: EvalConfig, seed: int
) -> PreparedTask:
    """Build a task's documents and requests.

    Raises:
        DataError: There are no documents, or they cannot be had.
    """
    row, length = find_task(name)
    wanted = config.num_samples or row.num_samples
    request = TaskRequest(name, tokenizer, length, wanted, seed, config.sources)
    with quiet_lm_eval():
        task = as_lm_eval_task({**row.build(request), "task": name})
        documents = list(task.eval_docs)[:wanted]
        if not documents:
            raise DataError(f"{name}: there are no documents; check the data")
        task.build_all_requests(limit=wanted)
    return PreparedTask(name, row, task, list(task.instances), _hash(documents), len(documents))


def check_length(name: str, context: int, where: str) -> None:
    """Refuse a task that is longer than a model's context.

    Raises:
        UsageError: Naming both, and what to set.
    """
    row, length = find_task(name)
    if row.has_length and row.unit == "tokens" and length is not None and length > context:
        raise UsageError(
            f"{name} is {length:,} tokens long, the context of {where} is {context:,}: choose a "
            f"shorter length, or set context_length={length} to test beyond it"
        )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the identity of a tokenizer, in hex: of its rules, or else of its tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = (
        json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    )
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keep lm-eval's bars and notices from the user: what matters is an error of ours."""
    from lm_eval.api import task as module

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, module.tqdm
    logger.setLevel(logging.ERROR)
    module.tqdm = lambda items, **_: items  # lm-eval has no switch for it
    try:
        yield
    finally:
        logger.setLevel(level)
        module.tqdm = bar


def _hash(documents: list[Any]) -> str:
    text = json.dumps(documents, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
