"""Makes the settings of a resumed run those it was given now.

An optimizer's state contains its settings, and a schedule's contains the base learning rates, so
that loading them would silently undo a changed recipe.
"""

from typing import Any

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
        if before is not None and after is not None and before != after:
            group["lr"] = group["lr"] * after / before if before else after
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs[index] = after
        group.update(wanted)
