"""A process that runs commands in children of its own, so that imports are paid for once.

Reads one JSON object per line, `{"arguments": [...], "log": path}`; answers with the child's id
and, when it is gone, with its exit code. The children are real processes and can be sent signals.
"""

import json
import os
import sys


def serve() -> None:
    """Answer until standard input closes."""
    from memdlm.cli.quiet import silence_libraries

    silence_libraries()

    import memdlm.cli.training_run  # noqa: F401  the expensive part
    from memdlm.cli import main

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = main(request["arguments"])
            sys.stdout.flush()
            os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
