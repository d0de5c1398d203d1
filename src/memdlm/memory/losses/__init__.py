"""Inner losses: how far the student is from the next state. One file each and this table."""

from memdlm.memory.losses import cross_entropy, divergence, hidden
from memdlm.memory.losses.inner_loss import InnerLoss, Prediction

INNER_LOSSES: dict[str, InnerLoss] = {
    "cross_entropy": cross_entropy.LOSS,
    "kl": divergence.FORWARD_KL,
    "reverse_kl": divergence.REVERSE_KL,
    "hidden_mse": hidden.MEAN_SQUARE,
    "hidden_cosine": hidden.COSINE,
}

__all__ = ["INNER_LOSSES", "InnerLoss", "Prediction"]
