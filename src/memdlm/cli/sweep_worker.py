"""A process of `memdlm sweep` that asks the arms of one training: `python -m ... SPEC`.

Not a command of its own: the sweep has written settings and arms to SPEC, as JSON.
"""

import json
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdlm.cli.failures import describe_failure
from memdlm.cli.host_memory import keep_freed_memory
from memdlm.cli.invocation import remember
from memdlm.cli.settings import build
from memdlm.errors import DataError, MemDLMError
from memdlm.files import write_text

if TYPE_CHECKING:
    from memdlm.evaluation.config import Arm, EvalConfig
    from memdlm.evaluation.presets import Preset
    from memdlm.evaluation.samples import Sample


def main(path: str) -> int:
    """Do what the spec at `path` says; return the exit code."""
    keep_freed_memory()
    try:
        _work(Path(path))
    except Exception as error:
        if not isinstance(error, MemDLMError):
            traceback.print_exc()
        message, code = describe_failure(error)
        print(f"memdlm: error: {message}", file=sys.stderr)
        return code
    return 0


def is_answered(place: Path, spec: Mapping[str, Any]) -> bool:
    """Tell whether a process has done `spec`, whose files stand at `place` with suffixes."""
    try:
        done = json.loads(place.with_name(f"{place.name}.done").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(done == _deciding(json.loads(json.dumps(spec))))


def _deciding(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec without what changes no number."""
    config = {k: v for k, v in spec["config"].items() if k not in ("batch_size", "batch_tokens")}
    kept = {k: v for k, v in spec.items() if k not in ("command", "folder")}
    return {**kept, "config": config}


def _work(path: Path) -> None:
    from memdlm.cli.libraries import prepare_libraries

    prepare_libraries()

    from memdlm.evaluation.config import Arm, EvalConfig
    from memdlm.evaluation.presets import EXPOSURE_BIAS, PRESETS

    spec = json.loads(path.read_text(encoding="utf-8"))
    preset = PRESETS[spec["preset"]]
    config = build(EvalConfig, spec["config"], str(path))
    arms = [build(Arm, arm, str(path)) for arm in spec["arms"]]
    # Results record what a person can type again, which is the sweep.
    remember(shlex.split(spec["command"])[1:])
    if preset.kind == EXPOSURE_BIAS:
        _measure_exposure_bias(spec, preset, config, arms)
    else:
        _evaluate(spec, config, arms)
    # Settings that results were refused for must not look answered, so this comes last.
    write_text(path.with_suffix(".done"), json.dumps(_deciding(spec), indent=1) + "\n")


def _evaluate(spec: Mapping[str, Any], config: "EvalConfig", arms: "Sequence[Arm]") -> None:
    from memdlm.evaluation.records import EvaluationFolder
    from memdlm.evaluation.runner import Provenance, Session, run_evaluation
    from memdlm.versions import collect_commit, collect_versions

    run_evaluation(
        config,
        arms,
        EvaluationFolder(Path(spec["folder"])),
        Provenance(spec["command"], collect_commit(Path())["git_commit"], collect_versions()),
        Session(say=lambda line: print(line, flush=True)),
    )


def _measure_exposure_bias(
    spec: Mapping[str, Any], preset: "Preset", config: "EvalConfig", arms: "Sequence[Arm]"
) -> None:
    from memdlm.cli.exposure_bias_run import run_exposure_bias
    from memdlm.evaluation.exposure_bias.comparison import BiasSettings
    from memdlm.evaluation.samples import read_samples

    number, seed = config.num_samples or 1, config.seeds[0]
    if config.tasks:
        samples = read_samples(None, config.tasks, number, seed)
    else:
        samples = _held_out(spec["data"], str(arms[0].model), number)
    settings = BiasSettings(
        num_steps=preset.num_steps or 2,
        response_length=None if spec["is_tiny"] else preset.response_length,
        seed=seed,
        batch_size=config.batch_size,
        chat_template=spec["data"]["chat_template"],
    )
    run_exposure_bias(arms, samples, settings, Path(spec["folder"]), title=preset.title)


def _held_out(data: Mapping[str, Any], model: str, number: int) -> "list[Sample]":
    """Return the first rows that no training has seen and that fit the recipe's window.

    Raises:
        DataError: There is none.
    """
    from memdlm.backbones.tokenizers import load_tokenizer
    from memdlm.cli.recipe import RecipeData
    from memdlm.data.dataset import read_dialogues, split_rows
    from memdlm.evaluation.samples import Sample, encode_samples

    config = build(RecipeData, data, "recipe", "data")
    if config.eval is not None:
        rows = read_dialogues(config.eval, config, config.num_eval_rows)
    elif config.train is not None:
        rows = read_dialogues(config.train, config, config.num_rows)
        rows = split_rows(rows, config.test_fraction, config.split_seed)[1]
    else:
        rows = []
    source = str(config.eval or config.train)
    samples = [Sample(row, source, (row.response,), False, (), None) for row in rows]
    samples = [sample for sample in samples if sample.dialogue.response]
    tokenizer = load_tokenizer(model)
    encoded = encode_samples(samples, tokenizer, chat_template=config.chat_template)
    pairs = zip(samples, encoded, strict=True)
    fitting = [one for one, ids in pairs if len(ids.input_ids) <= config.max_length]
    if not fitting:
        raise DataError(
            "exposure bias is measured on held-out rows, and the recipe has none: set data.eval, "
            "or data.test_fraction above 0"
        )
    return fitting[:number]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
