"""`memdlm eval` in several processes: the work of the one that starts them. Loads no torch."""

from memdlm.cli.evaluation_place import check_place, moved_aside
from memdlm.cli.invocation import arguments
from memdlm.cli.processes import run_processes
from memdlm.evaluation.harness.sharding import Shard
from memdlm.evaluation.records import EvaluationFolder

_OVERWRITE = "--overwrite"


def run_in_processes(count: int, folder: EvaluationFolder, overwrite: bool) -> None:
    """Run the command that was typed in `count` processes.

    None of them can know what the others have begun, so that an evaluation in `folder` that is to
    be overwritten is taken away here.

    Raises:
        UsageError: The folder to overwrite holds other files.
        MemDLMError: As `run_processes`.
    """
    typed = arguments()
    if not overwrite:
        run_processes(count, typed)
        return
    check_place(folder, overwrite, Shard())
    with moved_aside(folder):
        run_processes(count, [word for word in typed if word != _OVERWRITE])
