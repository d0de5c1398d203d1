"""Run an evaluation: every arm on every task and seed, each cell written once it is whole.

All that can be wrong with the input is found before the first answer: names, lengths, local data,
tokenizers, prompts that do not fit. A run that was killed goes on with the cells and the single
answers it has not got; several processes share the requests (`Shard`) and the first one writes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from memdlm.backbones.reading import read_config
from memdlm.backbones.wrapping import unwrap
from memdlm.evaluation.config import Arm, EvalConfig
from memdlm.evaluation.estimate import Estimate
from memdlm.evaluation.harness.progress import OnProgress
from memdlm.evaluation.harness.response_cache import ResponseCache
from memdlm.evaluation.harness.sharding import Shard, ShareDone
from memdlm.evaluation.loaded import arm_tokenizer, base_of, by_model, load_arm
from memdlm.evaluation.prepared import PreparedTask, check_length, prepare, tokenizer_hash
from memdlm.evaluation.records import CellKey, EvaluationFolder
from memdlm.evaluation.task_results import (
    answer_task,
    headline,
    language_model,
    task_settings,
)
from memdlm.evaluation.tasks.table import expand, find_task
from memdlm.evaluation.tasks.task import with_harness

Say = Callable[[str], None]


@dataclass(frozen=True)
class Provenance:
    """Where numbers come from; written into every cell.

    Attributes:
        command: What was typed.
        commit: Git commit of the working directory, "dirty" beside it where files differ.
        versions: Versions of the packages that decide numbers.
    """

    command: str
    commit: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Session:
    """How a process takes part, none of which changes a number.

    Attributes:
        shard: Its share of the requests.
        say: Receives lines about the course of the run.
        on_progress: Receives the harness's reports of every cell; None for none.
        wait_seconds: How long the first of several processes waits for news of the others.
    """

    shard: Shard = field(default_factory=Shard)
    say: Say = lambda line: None
    on_progress: OnProgress | None = None
    wait_seconds: float = 3600.0


# Arm -> (task, seed) -> its documents and requests.
Plan = dict[str, dict[tuple[str, int], PreparedTask]]


def run_evaluation(
    config: EvalConfig,
    arms: Sequence[Arm],
    folder: EvaluationFolder,
    provenance: Provenance,
    session: Session | None = None,
    plan: Plan | None = None,
) -> None:
    """Fill the results of `folder`, which `EvaluationFolder.begin` has made.

    Args:
        config: Tasks and settings.
        arms: What is compared; arms without a model are left out.
        folder: Where cells and responses go.
        provenance: Written into every cell.
        session: This process's part.
        plan: What `prepare_all` gave, where it was called before the folder was made.

    Raises:
        UsageError: A task is unknown, a length exceeds a context, or the folder holds cells of
            other settings.
        DataError: Documents cannot be had or made, or a tokenizer cannot encode them.
        CheckpointError: A model cannot be read.
    """
    session = session or Session()
    plan = prepare_all(config, arms, session.say) if plan is None else plan
    groups = by_model([arm for arm in arms if arm.model is not None])
    estimate = Estimate(session.say)
    with ResponseCache.open(folder.responses, session.shard) as cache:
        try:
            for number, group in enumerate(groups):
                estimate.num_models_left = len(groups) - number - 1
                _Run(config, plan, cache, folder, provenance, session, estimate).model(group)
        except Exception as error:
            # Those that wait for this process's answers would wait in vain.
            cache.mark_failed(" ".join(str(error).split()))
            raise


def prepare_all(config: EvalConfig, arms: Sequence[Arm], say: Say) -> Plan:
    """Build every task for every arm that has a model, once per tokenizer; nothing is answered.

    Raises:
        UsageError, DataError, CheckpointError: As `run_evaluation`.
    """
    with_harness()
    tasks, _ = expand(config.tasks)
    present = [arm for arm in arms if arm.model is not None]
    for name in tasks:
        source = find_task(name)[0].hub(config.sources)
        if source is not None:
            say(f"{name} needs the network: {source}")
    for arm in present:
        context = config.context_length or _context(str(arm.model))
        for name in tasks:
            check_length(name, context, str(arm.model))
    built: dict[tuple[str, str, int], PreparedTask] = {}
    plan: Plan = {}
    for arm in present:
        tokenizer = arm_tokenizer(arm)
        identity = tokenizer_hash(tokenizer)
        plan[arm.name] = {}
        for name in tasks:
            for seed in config.seeds:
                key = (identity, name, seed)
                if key not in built:
                    built[key] = prepare(name, tokenizer, config, seed)
                plan[arm.name][name, seed] = built[key]
    total = sum(len(prepared.requests) for row in plan.values() for prepared in row.values())
    say(f"{total:,} requests: {len(present)} arms, {len(tasks)} tasks, {len(config.seeds)} seeds")
    return plan


@dataclass(frozen=True)
class _Run:
    """What evaluating one model after another needs."""

    config: EvalConfig
    plan: Plan
    cache: ResponseCache
    folder: EvaluationFolder
    provenance: Provenance
    session: Session
    estimate: Estimate

    def model(self, arms: Sequence[Arm]) -> None:
        """Evaluate the arms that share one model, which is loaded once."""
        loaded = load_arm(arms[0])
        model, tokenizer, identity = loaded.model, loaded.tokenizer, loaded.identity
        if self.config.context_length is not None:
            own: Any = unwrap(model).config
            own.max_position_embeddings = self.config.context_length
        todo = []
        for arm in arms:
            for (task, seed), prepared in self.plan[arm.name].items():
                key = CellKey(arm.name, task, seed)
                settings = {**identity, **task_settings(self.config, arm, prepared)}
                if self.folder.read(key, settings) is None:
                    lm = self._language_model(model, tokenizer, arm, prepared, seed, identity)
                    todo.append((key, settings, lm, prepared, arm))
        self.estimate.begin([(lm, prepared.requests) for _, _, lm, prepared, _ in todo])
        for key, settings, lm, prepared, arm in todo:
            self._cell(key, settings, lm, prepared, arm)

    def _language_model(
        self,
        model: nn.Module,
        tokenizer: Any,
        arm: Arm,
        prepared: PreparedTask,
        seed: int,
        identity: Mapping[str, Any],
    ) -> Any:
        return language_model(
            model,
            tokenizer,
            self.config,
            arm,
            prepared,
            seed,
            settings=identity,
            cache=self.cache,
            shard=self.session.shard,
            wait_seconds=self.session.wait_seconds,
            say=self.session.say,
            on_progress=self.session.on_progress,
        )

    def _cell(
        self, key: CellKey, settings: Mapping[str, Any], lm: Any, prepared: PreparedTask, arm: Arm
    ) -> None:
        """Answer and write one cell."""
        self.session.say(f"{key}: {len(prepared.requests):,} requests")
        since = time.perf_counter()
        try:
            cell = answer_task(lm, prepared)
        except ShareDone:
            return  # the first process writes the cell
        source = self.provenance
        provenance = {
            "command": source.command,
            "commit": source.commit,
            "versions": dict(source.versions),
            "model": arm.model,
            "adapter": arm.adapter,
        }
        self.folder.write(key, {"settings": settings, "provenance": provenance, **cell})
        seconds = round(time.perf_counter() - since, 3)
        self.folder.note_time(
            {"arm": key.arm, "task": key.task, "seed": key.seed, "seconds": seconds}
        )
        self.session.say(f"{key}: {headline(prepared, cell)} ({seconds:.0f} s)")


def _context(model: str) -> int:
    """Return the context that a model's config.json says.

    Raises:
        CheckpointError: It cannot be read.
    """
    from transformers import AutoConfig

    base = base_of(model)
    read_config(base)  # with a message of ours if there is none
    config: Any = AutoConfig.from_pretrained(base, trust_remote_code=False)
    return int(config.max_position_embeddings)
