"""The benchmark of evaluation: the published way and ours answer alike, and are timed alike."""

import pytest

from benchmarks.speed.evaluate import bench


@pytest.mark.parametrize("family", ["quickstart", "llada2"])
@pytest.mark.parametrize("has_memory", [False, True])
def test_both_ways_answer_every_request(family: str, has_memory: bool) -> None:
    # Without a memory it checks besides that the answers are the same.
    found = bench(family, 64, has_memory, budget=0, num_samples=4, batch_size=2, repeats=1)
    assert list(found["gain"]) == ["published", "ours, batch 1", "ours, batch 2"]
    assert found["gain"]["published"] == 1.0
    assert all(rate > 0 for rate in found["samples_per_second"].values())
    assert found["memory"] is has_memory
