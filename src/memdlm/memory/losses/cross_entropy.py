"""The paper's inner loss: negative log-likelihood of the clean token (MemDLM Eq. 8)."""

import torch
from torch.nn import functional as F

from memdlm.memory.config import MemoryConfig
from memdlm.memory.losses.inner_loss import InnerLoss, Prediction


def compute(
    student: Prediction, teacher: Prediction | None, labels: torch.Tensor, config: MemoryConfig
) -> torch.Tensor:
    """Return -log p(label) [N]."""
    return F.cross_entropy(student.logits(), labels, reduction="none")


LOSS = InnerLoss(compute, needs_teacher=False, needs_logits=True)
