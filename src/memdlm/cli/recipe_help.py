"""`memdlm recipe`: every key that a recipe may have, with its default and what it means."""

import textwrap
from typing import Annotated

import typer


def recipe(
    pattern: Annotated[
        str, typer.Argument(help="Show only keys that contain this, e.g. memory.")
    ] = "",
    training: Annotated[
        bool, typer.Option("--training", help="Show the keys of the training section instead.")
    ] = False,
) -> None:
    """Explain every key of a recipe: its type, default and meaning."""
    from memdlm.cli.quiet import silence_libraries

    silence_libraries()
    from memdlm.cli.recipe import SET_ELSEWHERE, Recipe
    from memdlm.cli.settings import describe
    from memdlm.errors import UsageError
    from memdlm.training.config import MemDLMConfig

    if training:
        keys = [
            key
            for key in describe(MemDLMConfig, "training", depth=0)
            if key.key.split(".")[1] not in SET_ELSEWHERE
        ]
    else:
        keys = list(describe(Recipe))
    shown = [key for key in keys if pattern in key.key]
    if not shown:
        raise UsageError(f"no key contains {pattern!r}; `memdlm recipe` lists them all")
    for key in shown:
        default = f" = {key.default}" if key.default else ""
        print(f"{key.key}{default}  ({key.type})")
        print(
            textwrap.fill(
                " ".join(key.help.split()), 92, initial_indent="    ", subsequent_indent="    "
            )
        )
