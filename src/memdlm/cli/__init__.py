"""The command line. One command, one file, one row in the table below.

This package imports neither torch nor transformers before a command runs, so that `memdlm --help`
answers at once.
"""

from memdlm.cli.app import main

__all__ = ["main"]
