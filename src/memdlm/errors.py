"""Every error a user can cause, in one tree.

Each message is one line that says what is wrong, where, and how to mend it. The command line prints
that line and exits with the class's `exit_code`; Python callers catch `MemDLMError`.

    MemDLMError            1
    ├── UsageError         2   wrong arguments, recipe keys or settings
    │   └── ConfigError    2   a setting out of range, or two that exclude each other
    ├── DataError          1   a file, a row or a tokenizer that cannot be used
    ├── CheckpointError    1   a model or run folder that cannot be read, or written
    ├── NonFiniteError     1   a loss or gradient became inf or nan and the run stopped
    └── StoppedError     130   Ctrl-C ended the run in good order (SIGTERM: 143)
"""


class MemDLMError(Exception):
    """Base of all errors memdlm raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(MemDLMError):
    """The call itself is wrong: an unknown key, a missing argument, an impossible value."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration value is out of range or contradicts another one."""


class DataError(MemDLMError):
    """Training or evaluation data, or the tokenizer that should encode it, cannot be used."""


class CheckpointError(MemDLMError):
    """A model, adapter or run folder is missing, damaged, incompatible, or cannot be written."""


class NonFiniteError(MemDLMError):
    """A loss or gradient is inf or nan; the run stopped before it could harm the weights."""


class StoppedError(MemDLMError):
    """A signal ended the run in good order; the exit code is a shell's for it, 128 + its number."""

    exit_code = 130

    def __init__(self, message: str, signal_number: int = 2) -> None:
        """Keep the message and the signal's exit code (SIGINT's by default)."""
        super().__init__(message)
        self.exit_code = 128 + signal_number
