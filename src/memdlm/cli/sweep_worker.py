"""A process of `memdlm sweep` that asks the arms of one training: `python -m ... FOLDER SPEC`.

Not a command of its own: the sweep has begun FOLDER, and written settings and arms to SPEC as JSON.
"""

import json
import sys
import traceback
from pathlib import Path

from memdlm.cli.failures import describe_failure
from memdlm.cli.settings import build
from memdlm.errors import MemDLMError


def main(folder: str, spec: str) -> int:
    """Evaluate what `spec` says into `folder`; return the exit code."""
    try:
        _evaluate(Path(folder), Path(spec))
    except Exception as error:
        if not isinstance(error, MemDLMError):
            traceback.print_exc()
        message, code = describe_failure(error)
        print(f"memdlm: error: {message}", file=sys.stderr)
        return code
    return 0


def _evaluate(folder: Path, path: Path) -> None:
    from memdlm.cli.quiet import silence_libraries

    silence_libraries()

    from memdlm.evaluation.config import Arm, EvalConfig
    from memdlm.evaluation.records import EVALUATION, EvaluationFolder
    from memdlm.evaluation.runner import Provenance, Session, run_evaluation
    from memdlm.versions import collect_commit, collect_versions

    spec = json.loads(path.read_text(encoding="utf-8"))
    config = build(EvalConfig, spec["config"], str(path))
    arms = [build(Arm, arm, str(path)) for arm in spec["arms"]]
    command = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))["command"]
    run_evaluation(
        config,
        arms,
        EvaluationFolder(folder),
        Provenance(command, collect_commit(Path())["git_commit"], collect_versions()),
        Session(say=lambda line: print(line, flush=True)),
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
