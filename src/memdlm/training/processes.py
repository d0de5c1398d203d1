"""Several processes as one run: joining, taking turns, and what cannot be shared.

torchrun and `accelerate launch` start the processes and say in environment variables who is who.
The Trainer does the rest; here is what must be known before and around it.
"""

import json
import os
from pathlib import Path
from typing import Any

from torch import distributed

from memdlm.errors import ConfigError, UsageError


def world_size() -> int:
    """Return the number of processes that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Tell whether this process writes and prints for all: rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def join(*, on_cpu: bool) -> None:
    """Meet the other processes, over gloo on a CPU and NCCL on GPUs; harmless when alone.

    Raises:
        UsageError: There is no launcher, its port is taken, or the others cannot be reached.
    """
    if world_size() == 1 or distributed.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {world_size()} but {' and '.join(missing)} not set: start the run "
            "with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    from accelerate import PartialState  # type: ignore[import-untyped]

    try:
        PartialState(cpu=on_cpu)
    except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UsageError(
                f"port {os.environ.get('MASTER_PORT')} is in use: set MASTER_PORT to another, or "
                "launch with torchrun --standalone, which finds a free one"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"the {world_size()} processes of this run could not meet at {place} ({reason}): check "
            "MASTER_ADDR, MASTER_PORT and that all were started"
        ) from error


def wait() -> None:
    """Return when all processes have called it."""
    if distributed.is_initialized():
        distributed.barrier()


def leave() -> None:
    """Part from the other processes once nothing is left to exchange."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def check_world_size(checkpoint: Path, *, exact: bool) -> str | None:
    """Return a line of warning if `checkpoint` was written by another number of processes.

    Args:
        checkpoint: A folder that the Trainer wrote; every process leaves its random state in it.
        exact: Refuse in place of warning.

    Raises:
        UsageError: The number differs and `exact` is on.
    """
    before = len(list(checkpoint.glob("rng_state*.pth")))
    now = world_size()
    if before in (0, now):
        return None
    line = (
        f"{checkpoint} was written by {_processes(before)} and {_processes(now)} would go on: rows "
        "come in another order and masks are other draws"
    )
    if exact:
        raise UsageError(f"{line}; launch {before}, or leave out --exact")
    return line.replace(" would go on", " go on" if now > 1 else " goes on")


def _processes(number: int) -> str:
    return f"{number} process" if number == 1 else f"{number} processes"


def check_strategy(args: Any) -> None:
    """Refuse ways of sharing the work that training with fast weights cannot honour.

    Args:
        args: `TrainingArguments`.

    Raises:
        ConfigError: For DeepSpeed ZeRO-3, and for FSDP without an accelerator.
    """
    if _zero_stage(args.deepspeed) == 3:
        raise ConfigError(
            "deepspeed: ZeRO-3 fetches a layer's weights by counting on one forward and one "
            "backward per step, but the inner loop runs the last layers several times in between; "
            "use FSDP2 (recipes/accelerate/fsdp2.yaml) or ZeRO-2"
        )
    if args.use_cpu and (args.fsdp or _is_true("ACCELERATE_USE_FSDP")):
        raise ConfigError(
            "fsdp: accelerate has no FSDP on a CPU and would use DDP without a word; use "
            "recipes/accelerate/ddp.yaml there"
        )


def _zero_stage(setting: Any) -> int | None:
    """Return DeepSpeed's ZeRO stage from a Trainer's setting or accelerate's environment."""
    if not setting and _is_true("ACCELERATE_USE_DEEPSPEED"):
        setting = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if setting in (None, "", "none"):
            return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    if isinstance(setting, str) and Path(setting).is_file():
        setting = json.loads(Path(setting).read_text(encoding="utf-8"))
    if not isinstance(setting, dict):
        return None
    stage = setting.get("zero_optimization", {}).get("stage")
    return stage if isinstance(stage, int) else None


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
