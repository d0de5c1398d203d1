"""How many parameters a model has, how many of them a token meets, and how many are trained."""

from dataclasses import dataclass

from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.backbones.experts import Experts


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters.

    Attributes:
        total: Of the model itself, without adapter.
        active: Those that one token uses: all but the routed experts that it does not visit.
        active_beyond_table: The same without the table of input embeddings, of which a token reads
            one row. Publishers of mixtures of experts count either way.
        trained: Those that training updates, the adapter's included.
    """

    total: int
    active: int
    active_beyond_table: int
    trained: int


def count_parameters(base: DiffusionMaskedLM) -> ModelSizes:
    """Count the parameters of `base`, which has no adapter; all of them count as trained."""
    total = sum(parameter.numel() for parameter in base.parameters())
    idle = sum(
        sum(weight.numel() for weight in module.parameters())
        * (module.num_experts - base.config.num_experts_per_tok)
        // module.num_experts
        for module in base.modules()
        if isinstance(module, Experts)
    )
    table = base.model.embed_tokens.weight.numel()
    return ModelSizes(total, total - idle, total - idle - table, total)


def count_trained(model: nn.Module) -> int:
    """Return how many parameters of `model`, adapter included, take gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
