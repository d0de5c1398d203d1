"""Ablation: Kullback-Leibler divergence between teacher and student, in either direction.

The teacher is the same model with the current fast weights on the next state, without gradient.
There is no T^2 factor at temperature T: the published code has none.
"""

import torch
from torch.nn import functional as F

from memdlm.memory.config import MemoryConfig
from memdlm.memory.losses.inner_loss import InnerLoss, Prediction


def _log_probabilities(prediction: Prediction, temperature: float) -> torch.Tensor:
    return F.log_softmax(prediction.logits() / temperature, dim=-1)


def forward_kl(
    student: Prediction, teacher: Prediction | None, labels: torch.Tensor, config: MemoryConfig
) -> torch.Tensor:
    """Return KL(teacher || student) [N] at temperature T."""
    assert teacher is not None
    p = _log_probabilities(teacher, config.temperature)
    q = _log_probabilities(student, config.temperature)
    return (p.exp() * (p - q)).sum(dim=-1)


def reverse_kl(
    student: Prediction, teacher: Prediction | None, labels: torch.Tensor, config: MemoryConfig
) -> torch.Tensor:
    """Return KL(student || teacher) [N] at temperature T."""
    assert teacher is not None
    p = _log_probabilities(teacher, config.temperature)
    q = _log_probabilities(student, config.temperature)
    return (q.exp() * (q - p)).sum(dim=-1)


FORWARD_KL = InnerLoss(forward_kl, needs_teacher=True, needs_logits=True)
REVERSE_KL = InnerLoss(reverse_kl, needs_teacher=True, needs_logits=True)
