"""`memdlm train` in which rank 1 alone gets SIGTERM when step 2 begins."""

import os
import signal
import sys
from typing import Any

from memdlm.cli import main
from memdlm.training.trainer import MemDLMTrainer

take_step = MemDLMTrainer.training_step


def signalled_at_two(self: MemDLMTrainer, *args: Any, **kwargs: Any) -> Any:
    """Get the signal at the second step."""
    if self.state.global_step == 1 and self.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return take_step(self, *args, **kwargs)


MemDLMTrainer.training_step = signalled_at_two
sys.exit(main())
