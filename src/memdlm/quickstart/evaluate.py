"""Scores a model on held-out generated tasks, and measures its exposure bias.

Decoding is the paper's: greedy, low-confidence unmasking, one token per step.
"""

from collections import defaultdict
from typing import Any

import torch

from memdlm.data.config import DataConfig
from memdlm.data.dataset import encode_rows
from memdlm.data.tasks import TaskConfig, chance_level, generate_examples, score_text
from memdlm.evaluation.exposure_bias.measuring import measure_exposure_bias
from memdlm.evaluation.exposure_bias.results import ExposureBias
from memdlm.inference import generate
from memdlm.memory.config import MemoryConfig
from memdlm.quickstart.config import QuickstartConfig
from memdlm.sampling.config import SamplingConfig

# Enough for prompts of any tested length; what counts is the tasks' own length.
_WINDOW = 4096


def test_tasks(config: QuickstartConfig, length: int) -> TaskConfig:
    """Return the held-out tasks of `length` words; their values never occur in training."""
    return TaskConfig(
        tasks=config.tasks,
        length=length,
        num_examples=config.num_eval_examples,
        seed=config.seed,
        split="test",
    )


def evaluate_accuracy(
    model: Any,
    tokenizer: Any,
    config: QuickstartConfig,
    length: int,
    memory: MemoryConfig | None,
) -> dict[str, float]:
    """Return exact-match accuracy in [0, 1] per task, `all`, and `recall` of single answers."""
    examples = generate_examples(test_tasks(config, length))
    exact: dict[str, list[bool]] = defaultdict(list)
    recall = []
    for task in config.tasks:
        rows = [example for example in examples if example["task"] == task]
        if not rows:
            continue
        # As benchmarks do: a task has room for its longest answer and the end-of-text token.
        room = max(len(example["completion"].split()) for example in rows) + 1
        answers = generate(
            model,
            tokenizer,
            [example["prompt"] for example in rows],
            SamplingConfig(max_new_tokens=room),
            memory,
            seed=config.seed,
            batch_size=50,
        )
        for example, answer in zip(rows, answers, strict=True):
            score = score_text(example, answer.text)
            exact[task].append(score.exact)
            recall.append(score.recall)
    figures = {task: sum(hits) / len(hits) for task, hits in exact.items()}
    every = [hit for hits in exact.values() for hit in hits]
    return {**figures, "all": sum(every) / len(every), "recall": sum(recall) / len(recall)}


def guessing_accuracy(config: QuickstartConfig, length: int) -> dict[str, float]:
    """Return the accuracy of choosing blindly among the values present, per task and `all`."""
    levels: dict[str, list[float]] = defaultdict(list)
    for example in generate_examples(test_tasks(config, length)):
        levels[example["task"]].append(chance_level(example))
    figures = {task: sum(values) / len(values) for task, values in levels.items()}
    every = [value for values in levels.values() for value in values]
    return {**figures, "all": sum(every) / len(every)}


def evaluate_exposure_bias(
    model: Any, tokenizer: Any, config: QuickstartConfig, memory: MemoryConfig | None
) -> ExposureBias:
    """Measure exposure bias at the training length, on the task with the longest answers."""
    task = "variable_tracking" if "variable_tracking" in config.tasks else config.tasks[-1]
    rows = generate_examples(
        TaskConfig(
            tasks=(task,),
            length=config.train_length,
            num_examples=config.num_bias_examples,
            seed=config.seed,
            split="test",
        )
    )
    encoded = encode_rows(rows, DataConfig(max_length=_WINDOW), tokenizer, source="held-out tasks")
    prompts, responses = [], []
    for example in encoded.examples:
        ids = torch.as_tensor(example.input_ids, dtype=torch.int64)
        prompts.append(ids[: example.prompt_length])
        responses.append(ids[example.prompt_length :])
    return measure_exposure_bias(
        model, prompts, responses, memory=memory, seed=config.seed, batch_size=48
    )
