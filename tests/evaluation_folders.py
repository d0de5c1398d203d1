"""Folders of results as `memdlm eval` leaves them, with scores that a test chooses."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Scores = Callable[[str, str, int], Sequence[float] | None]

THREE = {
    "standard": "Standard MDLM",
    "train_only": "MemDLM (Train-Only)",
    "train_inference": "MemDLM (Train & Inference)",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VERSIONS = {"python": "3.11.9", "memdlm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
SAMPLING = {"max_new_tokens": 128, "temperature": 0.0, "decoder": "masked", "block_length": None}
MEMORY = {"enabled": True, "rank": 32, "learning_rate": 0.1, "prompt_mask_ratio": 0.2}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def has_memory(name: str) -> bool:
    """Tell whether an arm of this name has a memory, as the presets name them."""
    return not (name.startswith(("standard", "train_only")) or name.endswith("__train_only"))


def arm(name: str, label: str | None = None, **memory: Any) -> dict[str, Any]:
    """Return an arm of evaluation.json."""
    settings = {**MEMORY, **memory} if has_memory(name) else {"enabled": False}
    return {
        "name": name,
        "label": label or name,
        "model": "inclusionAI/LLaDA-MoE-7B-A1B-Base",
        "adapter": f"runs/{name}/adapter",
        "memory": has_memory(name),
        "settings": {"memory": settings, "dtype": "bfloat16"},
    }


def cell(
    name: str, task: str, seed: int, scores: Sequence[float], memory: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a result file."""
    samples = [
        {
            "id": number,
            "prompt_sha256": sha(f"{task}/{seed}/{number}"),
            "num_prompt_tokens": 4000,
            "target": "7",
            "response": "<b>7</b>",
            "memory": "written" if memory["enabled"] else "off",
            "metrics": {"score": value},
        }
        for number, value in enumerate(scores)
    ]
    return {
        "format": 1,
        "arm": name,
        "task": task,
        "seed": seed,
        "settings": {
            "model_fingerprint": sha("model"),
            "adapter_fingerprint": sha(name.removesuffix("__train_only")),
            "tokenizer_hash": sha("tokenizer"),
            "dtype": "bfloat16",
            "quantization": "nf4",
            "sampling": SAMPLING,
            "memory": dict(memory),
            "chat_template": "never",
            "truncation": "error",
            "data_hash": sha(f"{task}/{seed}"),
            "num_samples": len(scores),
        },
        "provenance": {
            "command": "memdlm eval --preset paper/table1 --output 'runs/<b>'",
            "commit": COMMIT,
            "versions": VERSIONS,
            "model": "inclusionAI/LLaDA-MoE-7B-A1B-Base",
            "adapter": f"runs/{name}/adapter",
        },
        "metrics": {
            "score": {
                "value": sum(scores) / len(scores),
                "stderr": None,
                "num_samples": len(scores),
            }
        },
        "samples": samples,
    }


def write_evaluation(
    folder: Path,
    scores: Scores,
    tasks: Sequence[str],
    arms: Sequence[Mapping[str, Any]] = tuple(arm(*pair) for pair in THREE.items()),
    **changes: Any,
) -> Path:
    """Write a folder of results; a result for which `scores` gives None is not written.

    Args:
        folder: Is made.
        scores: (arm, task, seed) -> the score of every sample.
        tasks: Names with lengths.
        arms: As `arm` gives them.
        changes: Other values of evaluation.json.
    """
    seeds = changes.get("seeds", [0])
    description = {
        "format": 1,
        "preset": None,
        "title": "A comparison",
        "kind": "scores",
        "command": "memdlm eval --preset paper/table1 --output 'runs/<b>'",
        "arms": list(arms),
        "tasks": list(tasks),
        "groups": {},
        "seeds": [0],
        "num_samples": {},
        **changes,
    }
    write(folder / "evaluation.json", description)
    for one in arms:
        for task in tasks:
            for seed in seeds:
                values = scores(one["name"], task, seed)
                if values is not None:
                    made = cell(one["name"], task, seed, values, one["settings"]["memory"])
                    write(cell_path(folder, one["name"], task, seed), made)
    return folder


def cell_path(folder: Path, name: str, task: str, seed: int = 0) -> Path:
    """Return where a result lies."""
    return folder / "results" / name / task / f"seed{seed}.json"


def write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def change(path: Path, **changes: Any) -> None:
    """Change values of a file, those within mappings by dotted keys with __ for the dot."""
    record = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = record
        for parent in parents:
            place = place[parent]
        place[last] = value
    write(path, record)


def write_exposure_bias(folder: Path, num_steps: int = 4) -> Path:
    """Write an exposure_bias.json of two arms; return the file."""
    steps = range(num_steps)
    arms = []
    for index, name in enumerate(("standard", "train_inference")):
        ratios = [1 + (2 - index) * step for step in steps]
        arms.append(
            {
                "name": name,
                "label": THREE[name],
                "model": "inclusionAI/LLaDA-MoE-7B-A1B-Base",
                "adapter": f"runs/{name}/adapter",
                "memory": index == 1,
                "settings": {"data_hash": sha("data"), "memory": {"enabled": index == 1}},
                "mask_ratio": [1 - step / num_steps for step in steps],
                "static_nll": [2.0] * num_steps,
                "sequential_nll": [2.0 * ratio for ratio in ratios],
                "ratio": ratios,
                "ratio_low": [0.9 * ratio for ratio in ratios],
                "ratio_high": [1.1 * ratio for ratio in ratios],
                "overall": {"value": 4.0 - index, "low": 3.5 - index, "high": 4.5 - index},
            }
        )
    pair = {"first": "standard", "second": "train_inference", "difference": -1.0}
    record = {
        **_measured(arms),
        "num_steps": num_steps,
        "pairs": [{**pair, "low": -1.5, "high": -0.5}],
    }
    write(folder / "exposure_bias.json", record)
    return folder / "exposure_bias.json"


def write_probe(folder: Path) -> Path:
    """Write a probe.json of one arm; return the file."""
    conditions = ["normal", "all_blocked"]
    interval = {"low": 0.1, "high": 0.4}
    cells = [
        {"condition": c, "memory": m, "metric": metric, "value": 0.25, **interval}
        for c in conditions
        for m in ("none", "prompt")
        for metric in ("exact", "recall", "nll")
    ]
    effects = [
        {"condition": c, "metric": metric, "difference": 0.125, "p_value": 0.5, **interval}
        for c in conditions
        for metric in ("exact", "recall", "nll")
    ]
    share = {"condition": "all_blocked", "metric": "recall", "share": 0.3, **interval}
    arms = [
        {
            "name": "train_inference",
            "label": THREE["train_inference"],
            "model": "inclusionAI/LLaDA-MoE-7B-A1B-Base",
            "adapter": None,
            "settings": {},
            "cells": cells,
            "memory_effects": effects,
            "recovered": [share],
        }
    ]
    write(folder / "probe.json", {**_measured(arms), "conditions": conditions})
    return folder / "probe.json"


def _measured(arms: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": 1,
        "arms": arms,
        "num_samples": 100,
        "seed": 0,
        "data": ["ruler_vt@4k"],
        "command": "memdlm measure 'runs/<b>'",
        "commit": COMMIT,
        "versions": VERSIONS,
    }
