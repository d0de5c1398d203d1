"""Two real processes (gloo) take the steps that one process takes."""

from typing import Any

import pytest
import torch

from tests.distributed import steps

TOLERANCE = 1e-6


def check_equal(ours: dict[str, Any], expected: dict[str, Any], start: dict[str, Any]) -> None:
    """Compare losses and weights, all of which training must have moved."""
    assert len(ours["losses"]) == steps.NUM_STEPS
    torch.testing.assert_close(ours["losses"], expected["losses"], rtol=TOLERANCE, atol=TOLERANCE)
    weights = {name.removeprefix("module."): value for name, value in ours["weights"].items()}
    assert weights.keys() == expected["weights"].keys() == start.keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            value, expected["weights"][name], rtol=TOLERANCE, atol=TOLERANCE, msg=name
        )
    assert any(not torch.equal(value, start[name]) for name, value in weights.items())


@pytest.mark.parametrize("case", steps.CASES)
def test_ddp_equals_one_process_that_accumulates(two_processes, case) -> None:
    expected = steps.with_trainer(case)
    start = steps.trained_weights(steps.model_of(case))
    for record in two_processes:
        assert record[f"ddp_{case}"]["wrapper"] == "DistributedDataParallel"
        check_equal(record[f"ddp_{case}"], expected, start)


@pytest.mark.parametrize("case", steps.CASES)
def test_fsdp2_equals_one_process_that_accumulates(two_processes, case) -> None:
    expected = steps.with_fsdp2(case, None)
    start = steps.trained_weights(steps.model_of(case))
    for record in two_processes:
        for way in ("fsdp2", "accelerate_fsdp2"):
            assert record[f"{way}_{case}"]["wrapper"].startswith("FSDP")
            check_equal(record[f"{way}_{case}"], expected, start)


@pytest.mark.parametrize("normaliser", steps.NORMALISERS)
def test_a_global_batch_memory_is_the_batch_memory_of_all_rows(two_processes, normaliser) -> None:
    expected = steps.shared_memory(normaliser)
    for record in two_processes:
        memory = record["memories"][normaliser]
        assert memory.keys() == expected.keys()
        for name, value in memory.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
