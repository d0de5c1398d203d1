"""Makes the settings of a resumed run those it was given now.

An optimizer's state contains its settings, and a schedule's contains the base learning rates, so
that loading them would silently undo a changed recipe.
"""

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

# What TrainingArguments sets; other entries of a group may be an optimizer's state in disguise.
_SETTINGS = ("initial_lr", "betas", "eps", "weight_decay", "momentum")


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return each parameter group's settings, `initial_lr` among them if it is scheduled."""
    return [
        {name: value for name, value in group.items() if name in _SETTINGS}
        for group in optimizer.param_groups
    ]


def apply_settings(settings: list[dict[str, Any]], optimizer: Any, scheduler: Any) -> None:
    """Give `optimizer`, just loaded, the settings it had before; the schedule keeps its position.

    Changes nothing where the settings are those of the checkpoint.

    Args:
        settings: From `settings_of`, taken when optimizer and scheduler were new.
        optimizer: Its state is loaded.
        scheduler: Likewise.
    """
    for index, (wanted, group) in enumerate(zip(settings, optimizer.param_groups, strict=True)):
        before, after = group.get("initial_lr"), wanted.get("initial_lr")
        group.update(wanted)
        if isinstance(scheduler, LambdaLR):  # all but the schedules that follow a metric
            scheduler.base_lrs[index] = group["initial_lr"]
            group["lr"] = group["initial_lr"] * scheduler.lr_lambdas[index](scheduler.last_epoch)
            scheduler._last_lr[index] = group["lr"]
        elif before and after and before != after:
            group["lr"] *= after / before
