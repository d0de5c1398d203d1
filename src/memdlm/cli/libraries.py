"""What a command does before it computes: libraries that are silent, and fast on this CPU."""

from memdlm.cli.host_matmul import speed_up_products
from memdlm.cli.quiet import silence_libraries


def prepare_libraries() -> None:
    """Silence the libraries and choose how matrices are multiplied.

    Call it before transformers, datasets and PEFT are imported.
    """
    silence_libraries()
    speed_up_products()
