"""The backbone inside a model that others have wrapped."""

from torch import nn

from memdlm.backbones.base import DiffusionMaskedLM
from memdlm.errors import UsageError


def backbone_of(model: nn.Module) -> DiffusionMaskedLM | None:
    """Return the backbone inside wrappers such as PEFT's; None for a model of another make."""
    return next((m for m in model.modules() if isinstance(m, DiffusionMaskedLM)), None)


def unwrap(model: nn.Module) -> DiffusionMaskedLM:
    """Return the backbone inside wrappers such as PEFT's and DDP's.

    Raises:
        UsageError: If there is none.
    """
    backbone = backbone_of(model) if isinstance(model, nn.Module) else None
    if backbone is None:
        raise UsageError(
            f"{type(model).__name__} holds no memdlm backbone; load the checkpoint with "
            "AutoModelForMaskedLM.from_pretrained after `import memdlm`"
        )
    return backbone
