"""Ablation: match the teacher's last hidden states, by mean square or by cosine.

Both sides are compared after the final norm. The published code compares a normed teacher with an
un-normed student on MoE backbones; `hidden_comparison: reference` reproduces that.
"""

import torch
from torch.nn import functional as F

from memdlm.memory.config import MemoryConfig
from memdlm.memory.losses.inner_loss import InnerLoss, Prediction


def _pair(
    student: Prediction, teacher: Prediction | None, config: MemoryConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    assert teacher is not None
    is_reference = config.hidden_comparison == "reference"
    return (student.hidden if is_reference else student.normed).float(), teacher.normed.float()


def mean_square(
    student: Prediction, teacher: Prediction | None, labels: torch.Tensor, config: MemoryConfig
) -> torch.Tensor:
    """Return the squared difference averaged over the width [N]."""
    ours, theirs = _pair(student, teacher, config)
    return (ours - theirs).square().mean(dim=-1)


def cosine(
    student: Prediction, teacher: Prediction | None, labels: torch.Tensor, config: MemoryConfig
) -> torch.Tensor:
    """Return 1 - cosine similarity [N]."""
    ours, theirs = _pair(student, teacher, config)
    return 1 - F.cosine_similarity(ours, theirs, dim=-1)


MEAN_SQUARE = InnerLoss(mean_square, needs_teacher=True, needs_logits=False)
COSINE = InnerLoss(cosine, needs_teacher=True, needs_logits=False)
