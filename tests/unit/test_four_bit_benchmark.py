"""What 4-bit weights hold, and what loading and running add, measured in processes of their own."""

import sys

import pytest

from benchmarks.four_bit.memory import SIZES, compare

LAYERS = 6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_stays_within_a_tenth_of_four_and_a_half_bits() -> None:
    found = compare(LAYERS)
    plain, four_bit = found["none"], found["nf4"]
    assert four_bit["weights_millions"] == plain["weights_millions"] > 300
    limit = 1.1 * four_bit["quantized_millions"] * 1e6 * 4.5 / 8 / 2**20
    assert four_bit["quantized"] == pytest.approx(four_bit["predicted"], rel=0.01)
    assert four_bit["quantized"] + four_bit["kept"] <= four_bit["at_rest"] + 8
    assert four_bit["peak_of_loading"] < limit + four_bit["kept"]
    assert four_bit["peak_of_loading"] < 0.35 * plain["peak_of_loading"]
    stack = SIZES["num_experts"] * 2 * SIZES["moe_intermediate_size"] * SIZES["hidden_size"] * 2
    assert four_bit["transient_of_running"] < 1.5 * stack / 2**20
