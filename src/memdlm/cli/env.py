"""`memdlm env`: versions and devices, for a bug report."""

import json
from typing import Annotated

import typer


def env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print versions and devices, for a bug report."""
    from memdlm.cli.host_matmul import speed_up_products
    from memdlm.cli.quiet import silence_loggers
    from memdlm.versions import collect_devices, collect_versions

    silence_loggers()
    # What adds up a CPU's float32 sums, and so decides their last bits.
    products = "PyTorch" if speed_up_products() is None else "oneDNN"
    found = {**collect_versions(), **collect_devices(), "cpu_products": products}
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:13} {value}")
