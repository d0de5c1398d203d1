import dataclasses
import subprocess
import sys

import pytest

from memdlm.errors import ConfigError
from memdlm.sampling.config import POLICIES, STEP_SCHEDULES, SamplingConfig
from memdlm.sampling.unmasking import UNMASKING_POLICIES, transfer_schedule


def test_defaults_are_one_block_and_one_token_per_step():
    config = SamplingConfig(max_new_tokens=12)
    assert (config.tokens_per_block, config.num_blocks, config.steps_per_block) == (12, 1, 12)


def test_blocks_share_the_steps():
    config = SamplingConfig(max_new_tokens=12, block_length=4, num_unmasking_steps=6)
    assert (config.tokens_per_block, config.num_blocks, config.steps_per_block) == (4, 3, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens: 0 .* integer from 1"),
        ({"max_new_tokens": 10**12}, "from 1 to 1000000"),
        ({"max_new_tokens": True}, "integer"),
        ({"num_unmasking_steps": -1}, "sampling.num_unmasking_steps: -1 "),
        ({"block_length": 2.0}, "sampling.block_length: 2.0 "),
        ({"policy": "best"}, "low_confidence, random, margin, entropy"),
        ({"step_schedule": "square"}, "even, linear, cosine"),
        ({"temperature": float("nan")}, "sampling.temperature: nan .* finite"),
        ({"temperature": -0.1}, "at least 0"),
        ({"temperature": "hot"}, "finite number"),
        ({"guidance_scale": float("inf")}, "sampling.guidance_scale: inf"),
        ({"suppress_tokens": 3}, "list of token ids"),
        ({"suppress_tokens": [-1]}, "sampling.suppress_tokens: -1"),
        ({"stop_at_eos": 1}, "true or false"),
        ({"seed": -1}, "sampling.seed"),
        ({"temperature": 1e9}, "at most 1000"),
        ({"top_k": 0}, "sampling.top_k: 0 .* integer from 1"),
        ({"top_p": 0.0}, "sampling.top_p: 0.0 .* above 0 and at most 1"),
        ({"top_p": 1.5}, "above 0 and at most 1"),
        ({"top_p": float("nan")}, "finite"),
        ({"threshold": -0.5}, "sampling.threshold: -0.5 .* above 0"),
        ({"threshold": 0.9, "policy": "entropy"}, "policy=entropy .* use low_confidence or margin"),
        ({"threshold": 0.9, "policy": "random"}, "use low_confidence or margin"),
        ({"confidence_temperature": 0.1, "policy": "random"}, "policy=random ignores confidence"),
        ({"confidence_temperature": float("nan")}, "finite"),
        ({"confidence_source": "dream"}, "model, sampling"),
        ({"schedule_epsilon": -1.0}, "sampling.schedule_epsilon: -1.0"),
        ({"end_tokens": "never"}, "free, defer, suppress"),
        ({"defer_tokens": "3"}, "sampling.defer_tokens: '3' .* list of token ids"),
        ({"stop_tokens": [True]}, "sampling.stop_tokens: True"),
        ({"min_new_tokens": -1}, "sampling.min_new_tokens: -1"),
        ({"min_new_tokens": 200}, "at most max_new_tokens=128"),
        ({"min_new_tokens": 1, "infill": True}, "0 with infill"),
        ({"stop_early": None}, "true or false"),
        ({"infill": "yes"}, "true or false"),
        ({"uneven_blocks": 1}, "true or false"),
        ({"max_new_tokens": 32, "block_length": 7}, "set max_new_tokens=35 or a block_length"),
        ({"max_new_tokens": 32, "block_length": 64}, "set max_new_tokens=64"),
        (
            {"max_new_tokens": 32, "block_length": 8, "num_unmasking_steps": 10},
            "4 blocks of 8 tokens; use 8 or 12",
        ),
        (
            {"max_new_tokens": 32, "block_length": 8, "num_unmasking_steps": 2},
            "tokens; use 4, or set",
        ),
    ],
)
def test_bad_settings_name_the_field_and_the_fix_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        SamplingConfig(**settings)
    assert "\n" not in str(error.value)
    assert "sampling." in str(error.value)


def test_a_list_from_a_recipe_becomes_a_tuple():
    assert SamplingConfig(suppress_tokens=[3, 4]).suppress_tokens == (3, 4)
    assert SamplingConfig(stop_tokens=[3]).stop_tokens == (3,)


def test_uneven_blocks_round_up_where_nothing_divides():
    config = SamplingConfig(
        max_new_tokens=20, block_length=8, num_unmasking_steps=8, uneven_blocks=True
    )
    assert (config.num_blocks, config.steps_per_block) == (3, 3)


def test_infilling_asks_for_no_fit_of_slots_it_does_not_append():
    assert SamplingConfig(infill=True, block_length=7, num_unmasking_steps=3).block_length == 7


def test_every_field_has_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(SamplingConfig))


def test_names_agree_with_the_functions_behind_them():
    assert set(POLICIES) == {*UNMASKING_POLICIES, "independent"}
    assert all(sum(transfer_schedule(7, 3, kind)) == 7 for kind in STEP_SCHEDULES)


def test_reading_the_config_adds_no_torch():
    code = """
import sys, memdlm
before = "torch" in sys.modules
import memdlm.sampling.config
sys.exit("torch" in sys.modules and not before)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
