"""The table of commands, and the one place where an error becomes a line and an exit code."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

import memdlm
from memdlm.cli.failures import describe_failure
from memdlm.cli.host_memory import keep_freed_memory
from memdlm.cli.invocation import remember
from memdlm.errors import StoppedError, UsageError

# Command -> the module in memdlm.cli that holds a function of the same name, or an application
# with commands of its own. Such a module is imported for every --help, so it imports torch and the
# like inside its functions only.
COMMANDS: dict[str, str] = {
    "quickstart": "quickstart",
    "train": "train",
    "plan": "plan",
    "eval": "eval",
    "sweep": "sweep",
    "exposure-bias": "exposure_bias",
    "probe": "probe",
    "report": "report",
    "generate": "generate",
    "chat": "chat",
    "memory": "memory",
    "merge": "merge",
    "recipe": "recipe_help",
    "env": "env",
}

# What Typer returns when a command was stopped with Ctrl-C.
_INTERRUPTED = 130


def build_app() -> typer.Typer:
    """Build the application from the table."""
    app = typer.Typer(
        name="memdlm",
        help="Train, run and evaluate memory-enhanced diffusion language models.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, module in COMMANDS.items():
        entry = getattr(importlib.import_module(f"memdlm.cli.{module}"), name.replace("-", "_"))
        if isinstance(entry, typer.Typer):
            app.add_typer(entry, name=name)
        else:
            app.command(name, help=_in_whole_paragraphs(entry))(entry)
    return app


def _in_whole_paragraphs(entry: Callable[..., None]) -> str:
    """Return a docstring without the line breaks of the source, which Typer would show."""
    paragraphs = (inspect.getdoc(entry) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    A run that SIGTERM ended in good order returns 143.

    Results go to standard output, everything else to standard error. Whatever fails is one line;
    with --debug anywhere in the command it is a traceback.

    Args:
        argv: Arguments without the program's name; the process's own when None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    remember(arguments)
    keep_freed_memory()
    command = typer.main.get_command(build_app())
    try:
        result = command.main(arguments, prog_name="memdlm", standalone_mode=False)
        sys.stdout.flush()
        if result == _INTERRUPTED:
            print("memdlm: interrupted", file=sys.stderr)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # The reader of our output has gone (`memdlm generate ... | head`). Python would complain
        # about it once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TyperException as error:
        print(f"memdlm: error: {_one_line(error.format_message())}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        is_failure = not isinstance(error, StoppedError)
        if debug and is_failure:
            raise
        message, code = describe_failure(error)
        kind = "error: " if is_failure else ""
        if not _is_said_by_another(error):
            print(f"memdlm: {kind}{_one_line(message)}", file=sys.stderr)
        return code


def _is_said_by_another(error: Exception) -> bool:
    """Tell whether the first of several processes prints this: it ends all of them alike."""
    return isinstance(error, UsageError | StoppedError) and os.environ.get("RANK", "0") != "0"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"memdlm {memdlm.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_show_version
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback when something fails.")
    ] = False,
) -> None:
    pass


def _one_line(text: str) -> str:
    return " ".join(text.split())
