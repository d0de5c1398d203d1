"""What a sweep would do: recipes, settings and shared trainings of every preset."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from memdlm.cli.run_folder import RECIPE
from memdlm.cli.sweep_plan import (
    SweepPlan,
    SweepRequest,
    plan_sweep,
    training_key,
    variant_memory,
    variant_recipe,
    variant_sampling,
)
from memdlm.cli.sweep_request import SweepArguments, read_request
from memdlm.cli.sweep_run import sweep_jobs
from memdlm.errors import UsageError
from memdlm.evaluation.presets import PRESETS
from memdlm.memory.config import MemoryConfig

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = (RECIPES / "llada_moe/llada_moe_lora.yaml", RECIPES / "llada2_mini/llada2_mini_lora.yaml")


def request(preset: str, folder: Path, **changes: object) -> SweepRequest:
    values = {"preset": preset, "model": "tiny", "output": folder, **changes}
    return read_request(SweepArguments(**values))  # type: ignore[arg-type]


def plan(preset: str, folder: Path, **changes: object) -> SweepPlan:
    return plan_sweep(request(preset, folder, **changes))


@pytest.mark.parametrize("recipe", PAPER, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_every_variant_builds_on_the_papers_recipes(preset, recipe) -> None:
    base = yaml.safe_load(recipe.read_text())
    for variant in preset.variants:
        built = variant_recipe(base, variant, "recipe")
        memory = variant_memory(built, variant)
        assert memory.enabled == variant.memory
        for section, values in variant.train.items():
            for key, value in values.items():
                assert getattr(getattr(built, section), key) == value
        assert built.adapter.kind == "lora"  # the recipe's own settings stay
        assert variant_sampling(variant, "masked").block_length is None
        blocks = variant_sampling(variant, "block")
        assert (blocks.block_length, blocks.threshold) == (32, 0.95)
        replace(blocks, max_new_tokens=16)  # answers shorter than a block are possible


def test_all_ablations_share_25_trainings(tmp_path) -> None:
    planned = plan("ablations", tmp_path)
    assert len(planned.trainings) == 25
    labels = {label for training in planned.trainings for label in training.variants}
    assert len([label for label in labels if label.endswith(": standard_mdlm")]) == 7
    default = next(t for t in planned.trainings if "supervision: cross_entropy" in t.variants)
    shared = ("scope: ffn_0.10", "gradients: local_clip_1.0", "pre_anchor: 1.5", "steps: 2")
    assert {*shared, "anchor_ratio: 0.8", "stages: both_clean_target"} <= set(default.variants)
    assert default.recipe.memory == MemoryConfig(learning_rate=0.02)
    folders = [evaluation.folder for evaluation in planned.evaluations]
    assert folders[0] == tmp_path / "supervision"
    assert {training.root for training in planned.trainings} == {tmp_path / "trainings"}


def test_every_evaluation_comes_right_after_the_training_that_it_needs_last(tmp_path) -> None:
    planned = plan("ablations", tmp_path)
    jobs = sweep_jobs(planned, "memdlm sweep")
    assert len({job.name for job in jobs}) == len(jobs) == 25 + 39
    places = {job.name: place for place, job in enumerate(jobs)}
    for job in jobs:
        assert all(places[name] < places[job.name] for name in job.after)
    first = [job.kind for job in jobs[:4]]
    assert first == ["training", "evaluation of ablations/supervision"] * 2
    (bias,) = sweep_jobs(plan("paper/figure3", tmp_path), "memdlm sweep")[2:]
    assert len(bias.after) == 2


def test_a_key_depends_on_the_settings_and_not_on_the_place(tmp_path) -> None:
    first = plan("paper/table1", tmp_path / "a").trainings
    second = plan("paper/table1", tmp_path / "b", trainings=tmp_path / "c").trainings
    assert [training.key for training in first] == [training.key for training in second]
    assert second[0].place.parent == tmp_path / "c"
    changed = plan("paper/table1", tmp_path, assignments=("training.max_steps=2",)).trainings
    assert {t.key for t in changed}.isdisjoint(t.key for t in first)
    assert first[0].key == training_key(replace(first[0].recipe, output_dir="elsewhere"))


def test_a_table_has_two_trainings_and_three_arms(tmp_path) -> None:
    planned = plan("paper/table1", tmp_path)
    baseline, memory = planned.trainings
    assert (baseline.recipe.memory.enabled, memory.recipe.memory.enabled) == (False, True)
    arms = {arm.arm.name: arm for arm in planned.evaluations[0].arms}
    assert arms["standard"].training == baseline.key
    assert arms["train_only"].training == arms["train_inference"].training == memory.key
    assert arms["train_inference"].arm.memory.enabled
    assert arms["train_inference"].arm.model == str(memory.place / "model")
    assert not arms["train_only"].arm.memory.enabled
    assert planned.evaluations[0].folder == tmp_path


def test_an_arm_is_asked_with_the_memory_that_it_was_trained_with(tmp_path) -> None:
    arms = {p.arm.name: p.arm for p in plan("ablations/scope", tmp_path).evaluations[0].arms}
    assert arms["full_parameter"].memory.kind == "full"
    assert arms["ffn_attention_0.10"].memory.scope == "ffn_attention"
    assert arms["ffn_0.25"].memory == MemoryConfig(learning_rate=0.02, layer_fraction=0.25)


def test_limits_keep_the_other_arms_in_the_description_but_do_not_ask_them(tmp_path) -> None:
    planned = plan("ablations/supervision", tmp_path, limit_variants="kl, standard_mdlm")
    (evaluation,) = planned.evaluations
    wanted = [arm.arm.name for arm in evaluation.arms if arm.is_wanted]
    assert wanted == ["standard_mdlm", "kl", "kl__train_only"]
    assert len(evaluation.arms) == 11
    assert len(planned.trainings) == 2
    only = plan("ablations/supervision", tmp_path, limit_variants="kl__train_only")
    assert [arm.arm.name for arm in only.evaluations[0].arms if arm.is_wanted] == ["kl__train_only"]


def test_trainings_are_repeated_with_every_seed_and_evaluated_apart(tmp_path) -> None:
    planned = plan("paper/table1", tmp_path, training_seeds="3,5")
    assert [training.recipe.seed for training in planned.trainings] == [3, 3, 5, 5]
    assert len({training.key for training in planned.trainings}) == 4
    assert planned.trainings[0].variants == ("table1: standard, seed 3",)
    folders = [evaluation.folder for evaluation in planned.evaluations]
    assert folders == [tmp_path / "training_seed3", tmp_path / "training_seed5"]
    jobs = sweep_jobs(planned, "memdlm sweep")
    assert len({job.name for job in jobs}) == len(jobs) == 4 + 4
    # The recipe's own seed gives the training that a sweep without the option has.
    alone = plan("paper/table1", tmp_path, assignments=("seed=5",))
    assert [t.key for t in alone.trainings] == [t.key for t in planned.trainings[2:]]
    both = plan("ablations", tmp_path, training_seeds="0,1")
    assert len(both.trainings) == 2 * 25
    assert both.evaluations[1].folder == tmp_path / "supervision" / "training_seed1"


def test_the_evaluation_can_be_changed(tmp_path) -> None:
    settings = ("batch_size=3", "sources.sentences=simple")
    planned = plan("paper/table1", tmp_path, seeds="0,7", num_samples=4, settings=settings)
    config = planned.evaluations[0].config
    assert (config.seeds, config.num_samples, config.batch_size) == ((0, 7), 4, 3)
    assert config.sources.sentences == "simple"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": None}, "there is no preset"),
        ({"preset": "ablations/scop"}, "did you mean ablations/scope"),
        ({"model": None}, "exactly one of --recipe"),
        ({"model": "GSAI-ML/LLaDA-8B-Base"}, "use --model tiny"),
        ({"recipe": PAPER[0]}, "exactly one of --recipe"),
        ({"limit_variants": "klx"}, "did you mean kl"),
        ({"seeds": "a"}, "--seeds a"),
        ({"training_seeds": "0,x"}, "--training-seeds 0,x"),
        ({"training_seeds": "1,1"}, "name different seeds"),
        ({"assignments": ("memory.rnak=1",)}, "did you mean memory.rank"),
        ({"settings": ("batchsize=1",)}, "did you mean batch_size"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        plan_sweep(request(**{"preset": "ablations/supervision", "folder": tmp_path, **arguments}))


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path, memdlm) -> None:
    shown = memdlm(
        "sweep", "ablations/steps", "--model", "tiny", "--output", tmp_path / "s", "--dry-run"
    )
    assert shown.code == 0, shown.err
    assert "4 trainings" in shown.out
    assert "steps: 3" in shown.out and "new" in shown.out
    assert "2, 2__train_only, 3, 3__train_only, 4, 4__train_only" in shown.out
    assert not (tmp_path / "s").exists()


def test_the_list_names_every_preset_and_its_variants(memdlm) -> None:
    shown = memdlm("sweep", "--list").out
    for preset in PRESETS.values():
        assert preset.name in shown
        assert ", ".join(variant.name for variant in preset.variants) in shown


def test_a_gpu_alone_is_refused(memdlm) -> None:
    line = memdlm("sweep", "ablations/steps", "--model", "tiny", "--gpu", "h200").error_line(2)
    assert "--dry-run" in line


def test_begun_and_finished_trainings_are_told_apart(tmp_path, memdlm) -> None:
    trainings = plan("ablations/steps", tmp_path).trainings
    (trainings[0].place / "model").mkdir(parents=True)
    trainings[1].place.mkdir()
    (trainings[1].place / RECIPE).write_text("")
    shown = memdlm("sweep", "ablations/steps", "--model", "tiny", "-o", tmp_path, "--dry-run").out
    assert f"{trainings[0].key}  finished" in shown
    assert f"{trainings[1].key}  begun" in shown
    assert f"{trainings[2].key}  new" in shown
