"""What `memdlm sweep` shows without doing anything: the presets, and a plan."""

from typing import TYPE_CHECKING

from memdlm.evaluation.presets import PRESETS

if TYPE_CHECKING:
    from memdlm.cli.sweep_plan import PlannedEvaluation, SweepPlan, Training


def show_presets() -> None:
    """Print every preset with its variants and tasks."""
    for preset in PRESETS.values():
        print(f"{preset.name}  {preset.title}")
        print(f"    {preset.description}")
        print(f"    variants: {', '.join(variant.name for variant in preset.variants)}")
        print(f"    tasks: {', '.join(preset.tasks) or 'held-out rows of the training data'}")
        print(f"    tiny: {', '.join(preset.tiny.tasks)} ({preset.tiny.num_samples} each)")


def show_plan(plan: "SweepPlan", gpu: str | None) -> None:
    """Print what would be trained and evaluated and, for a GPU, what it costs."""
    print(f"{len(plan.trainings)} trainings")
    for training in plan.trainings:
        print(f"  {training.key}  {_state(training)}  {training.label}")
    for evaluation in plan.evaluations:
        _show_evaluation(evaluation)
    if gpu is not None:
        from memdlm.cli.sweep_cost import show_costs

        show_costs(plan, gpu)


def _show_evaluation(evaluation: "PlannedEvaluation") -> None:
    arms = evaluation.wanted
    config = evaluation.config
    samples = "as many documents as the paper's"
    if config.num_samples is not None:
        samples = f"{config.num_samples} documents each"
    seeds = ", ".join(map(str, config.seeds))
    tasks = ", ".join(config.tasks) or "held-out rows of the training data"
    print(f"{evaluation.name} into {evaluation.folder}")
    print(f"  {len(arms)} arms: {', '.join(arm.name for arm in arms)}")
    print(f"  {tasks}; {samples}, seeds {seeds}")


def _state(training: "Training") -> str:
    if training.is_finished:
        return "finished"
    return "begun   " if training.place.exists() else "new     "
