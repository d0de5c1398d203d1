"""What a sweep would cost: counts times requests, and a floor for steps on few tokens."""

import pytest

from memdlm.cli.sweep_cost import UTILISATION, ArmCost, CostModel, preset_costs
from memdlm.cli.sweep_plan import PlannedEvaluation, plan_sweep
from memdlm.cli.sweep_request import SweepArguments, read_request
from memdlm.evaluation.config import Arm, EvalConfig
from memdlm.evaluation.presets import PRESETS
from memdlm.memory.config import MemoryConfig
from memdlm.sampling.config import SamplingConfig

TASKS = ("babilong_qa1@1k", "ruler_vt@512")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> PlannedEvaluation:
    """The tiny sweep of Table 1, which is never run."""
    output = tmp_path_factory.mktemp("cost")
    arguments = SweepArguments(preset="paper/table1", model="tiny", output=output)
    return plan_sweep(read_request(arguments)).evaluations[0]


@pytest.fixture(scope="module")
def model(evaluation) -> CostModel:
    """The costs of the quickstart's network."""
    return CostModel.of_recipe(evaluation.recipe)


def test_costs_are_requests_times_their_flops(evaluation, model) -> None:
    config = EvalConfig(tasks=TASKS, num_samples=10, seeds=(0, 1))
    standard, train_only, inference = preset_costs(
        PRESETS["paper/table1"], evaluation.wanted, config, model
    )
    assert standard.num_requests == 2 * 2 * 10
    assert (standard.write, train_only.decode) == (0, standard.decode)
    assert inference.write > 0
    assert inference.decode > standard.decode  # the memory's own products at every step
    half = model.scores(evaluation.wanted[0], EvalConfig(tasks=TASKS, num_samples=10))
    assert 2 * half.decode == standard.decode


def test_a_step_takes_at_least_the_reading_of_the_weights(model) -> None:
    reads = ArmCost("a", 1, write=0, decode=10**9, read=10**12)
    assert reads.seconds("h200") == pytest.approx(1e12 / 4.8e12 / UTILISATION)
    computes = ArmCost("a", 1, write=10**15, decode=10**15, read=10**6)
    assert computes.seconds("h200") == pytest.approx(2e15 / 989e12 / UTILISATION)
    few = model.scores(an_arm(), EvalConfig(tasks=TASKS, num_samples=16, batch_size=16))
    many = model.scores(an_arm(), EvalConfig(tasks=TASKS, num_samples=16, batch_size=1))
    assert many.read == 16 * few.read


def an_arm() -> Arm:
    return Arm("a", "A", None, memory=MemoryConfig(enabled=False), sampling=SamplingConfig())


def test_exposure_bias_scores_every_step_twice(evaluation, model) -> None:
    preset, config = PRESETS["paper/figure3"], EvalConfig(num_samples=2)
    (cost,) = preset_costs(preset, [an_arm()], config, model)
    forward = cost.decode / (2 * 3 * 48)
    assert forward == int(forward)


def test_the_command_prints_trainings_arms_and_a_sum(tmp_path, memdlm) -> None:
    shown = memdlm(
        *("sweep", "ablations/steps", "--model", "tiny", "--output", tmp_path, "--dry-run"),
        *("--gpu", "h200", "--limit-variants", "2", "--eval-set", "tasks=[babilong_qa1@1k]"),
    )
    assert shown.code == 0, shown.err
    assert "30% of its speed (an assumption)" in shown.out
    assert "training steps: 2: 300 steps" in shown.out
    assert "ablations/steps, 2__train_only: 100 requests" in shown.out
    assert "ablations/steps, all:" in shown.out
    line = memdlm("sweep", "ablations/steps", "--model", "tiny", "--dry-run", "--gpu", "abacus").err
    assert "known are" in line
