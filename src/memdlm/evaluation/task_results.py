"""An arm's results on one task: answered by the harness, scored by lm-eval, with their settings."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from memdlm.evaluation.config import Arm, EvalConfig
from memdlm.evaluation.prepared import PreparedTask, quiet_lm_eval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memdlm.evaluation.harness.model import DiffusionLM


def task_settings(config: EvalConfig, arm: Arm, prepared: PreparedTask) -> dict[str, Any]:
    """Return what decides a result beside who answers and the seed."""
    likelihood = asdict(config.likelihood)
    del likelihood["batch_size"]  # decides no number
    has_memory = arm.memory.enabled
    return {
        "sampling": asdict(arm.sampling),
        "memory": asdict(arm.memory) if has_memory else None,
        "objective": asdict(arm.objective) if has_memory else None,
        "likelihood": likelihood,
        "chat_template": config.chat_template,
        "truncation": prepared.row.truncation,
        "context_length": config.context_length,
        "data_hash": prepared.data_hash,
        "num_samples": prepared.num_samples,
    }


def language_model(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    config: EvalConfig,
    arm: Arm,
    prepared: PreparedTask,
    seed: int,
    **session: Any,
) -> "DiffusionLM":
    """Return what lm-eval asks about a task; `session` is how this process takes part."""
    from memdlm.evaluation.harness.model import DiffusionLM

    return DiffusionLM(
        model,
        tokenizer,
        sampling=arm.sampling,
        memory=arm.memory if arm.memory.enabled else None,
        objective=arm.objective,
        likelihood=config.likelihood,
        seed=seed,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        truncation=prepared.row.truncation,
        chat_template=config.chat_template,
        **session,
    )


def answer_task(lm: "DiffusionLM", prepared: PreparedTask) -> dict[str, Any]:
    """Answer all requests of a task and let lm-eval score them.

    Returns:
        `metrics`: name -> value, stderr, num_samples; `samples`: one mapping for each document.

    Raises:
        ShareDone: This process has answered its share, and another one scores.
    """
    from lm_eval.evaluator import evaluate

    with quiet_lm_eval():
        results: Any = evaluate(
            lm=lm,
            task_dict={prepared.name: prepared.task},
            limit=prepared.num_samples,
            bootstrap_iters=100,  # means have a formula; this asks for the error of others, too
            log_samples=True,
        )
    figures = results["results"][prepared.name]
    samples = results["samples"][prepared.name]
    metrics = {}
    for name in prepared.row.metrics:
        error = figures.get(f"{name}_stderr,none")
        metrics[name] = {
            "value": float(figures[f"{name},none"]),
            "stderr": float(error) if isinstance(error, int | float) else None,
            "num_samples": len(samples),
        }
    return {"metrics": metrics, "samples": [_sample(row, lm, prepared) for row in samples]}


def _sample(sample: Mapping[str, Any], lm: "DiffusionLM", prepared: PreparedTask) -> dict[str, Any]:
    """Return what a result keeps of a document."""
    number = sample["doc_id"]
    places = sorted(key for key in lm.records if key[:2] == (prepared.name, number))
    records = [lm.records[place][0] for place in places]
    first = records[0]
    target = sample["target"]
    row: dict[str, Any] = {
        "id": number,
        "prompt_sha256": first.prompt_sha256,
        "num_prompt_tokens": first.num_prompt_tokens,
        "target": target if isinstance(target, str) else str(target),
        "response": first.response,
        "memory": first.memory,
        "metrics": {name: float(sample[name]) for name in prepared.row.metrics},
    }
    if first.num_dropped_tokens:
        row["num_dropped_tokens"] = first.num_dropped_tokens
    if first.response is None:
        row["log_likelihoods"] = [record.log_likelihood for record in records]
        row["standard_errors"] = [record.standard_error for record in records]
    return row


def headline(prepared: PreparedTask, result: Mapping[str, Any]) -> str:
    """Return a result's main metric as one would say it."""
    name = prepared.row.metrics[0]
    figure = result["metrics"][name]
    error = "" if figure["stderr"] is None else f" \u00b1 {100 * figure['stderr']:.1f}"
    return f"{name} {100 * figure['value']:.1f}{error} %"
