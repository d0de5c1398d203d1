"""`memdlm train` in which rank 1 is killed when step 4 begins, as the kernel does when memory ends.

Steps 1 to 3 are then taken, and the checkpoint of step 2 written.
"""

import os
import signal
import sys
from typing import Any

from memdlm.cli import main
from memdlm.training.trainer import MemDLMTrainer

take_step = MemDLMTrainer.training_step


def killed_at_four(self: MemDLMTrainer, *args: Any, **kwargs: Any) -> Any:
    """Die at the fourth step."""
    if self.state.global_step == 3 and self.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, *args, **kwargs)


MemDLMTrainer.training_step = killed_at_four
sys.exit(main())
