"""`memdlm env`: versions and devices, for a bug report."""

import json
from typing import Annotated

import typer


def env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print versions and devices, for a bug report."""
    from memdlm.versions import collect_devices, collect_versions

    found = {**collect_versions(), **collect_devices()}
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:13} {value}")
