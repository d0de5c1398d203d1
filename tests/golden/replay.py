"""Replays golden fixtures through the library and reports the largest deviations.

    python tests/golden/replay.py DIR...

Each DIR is a fixture folder or any folder above some: `backbones/<name>`,
`inner/<backbone>/<case>`, `infer/<case>`, `peft_adapters/<backbone>`, `sampler/<sampler>/<case>`,
`schedule`, `tables`. An adapter's base is `backbones/<backbone>` beside `peft_adapters`. Prints one
JSON line per case and a summary, and exits 1 if a case deviates by more than the tolerance: logits
1e-4, losses 1e-5 relative, gradients and fast weights 1e-5 of the tensor's norm, counts,
decoded tokens and their order exact. A checkpoint that the library refuses at load is reported as a
refusal.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from memdlm.errors import MemDLMError

sys.path.insert(0, str(Path(__file__).parent))

import replay_adapters
import replay_backbones
import replay_infer
import replay_inner
import replay_sampler
import replay_schedule

TOLERANCES = {
    "logits": 1e-4,
    "hidden": 1e-4,
    "routing": 1e-4,
    "loss": 1e-5,
    "gradient": 1e-5,
    "fast_weights": 1e-5,
    "coefficient": 1e-6,
    "count": 0.0,
}


def find_cases(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (kind, folder) of every fixture at or below `folder`."""
    if (folder / "alpha.safetensors").exists():
        yield "schedule", folder
    elif (folder / "layer_selection.json").exists():
        yield "tables", folder
    elif (folder / "outputs.safetensors").exists() and (folder / "config.json").exists():
        yield "backbones", folder
    elif (folder / "outputs.safetensors").exists() and (folder / "adapter_config.json").exists():
        yield "peft_adapters", folder
    elif (folder / "tensors.safetensors").exists() and (folder.parent / "model").is_dir():
        yield "inner", folder
    elif (folder / "tensors.safetensors").exists() and folder.parent.name == "infer":
        yield "infer", folder
    elif (folder / "tensors.safetensors").exists() and folder.parent.parent.name == "sampler":
        yield "sampler", folder
    else:
        for child in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from find_cases(child)


REPLAYS = {
    "backbones": replay_backbones.replay,
    "inner": replay_inner.replay,
    "infer": replay_infer.replay,
    "sampler": replay_sampler.replay,
    "peft_adapters": replay_adapters.replay,
    "schedule": replay_schedule.replay_schedule,
    "tables": replay_schedule.replay_tables,
}


def replay_case(kind: str, folder: Path) -> dict[str, object]:
    """Replay one case; return its name, status and largest deviation of each kind."""
    name = "/".join(folder.parts[-3 if kind in ("inner", "sampler") else -2 :])
    try:
        deviations = REPLAYS[kind](folder)
    except MemDLMError as error:
        return {"case": name, "status": "refused", "reason": str(error)}
    exceeded = {
        key: value
        for key, value in deviations.items()
        if not value <= TOLERANCES[key.split(".")[0]]
    }
    status = "failed" if exceeded or not deviations else "ok"
    return {"case": name, "status": status, **deviations}


def main(arguments: list[str]) -> int:
    """Replay all cases below the folders given; return the exit code."""
    folders = [Path(argument) for argument in arguments]
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if not folders or missing:
        print(f"usage: replay.py DIR...  (no such folder: {', '.join(missing) or 'none given'})")
        return 2
    counts = {"ok": 0, "failed": 0, "refused": 0}
    for folder in folders:
        for kind, case in find_cases(folder):
            result = replay_case(kind, case)
            counts[str(result["status"])] += 1
            print(json.dumps(result), flush=True)
    print(json.dumps({"summary": counts}))
    return 1 if counts["failed"] or not counts["ok"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
