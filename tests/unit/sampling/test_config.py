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
        ({"max_new_tokens": 32, "block_length": 7}, "set max_new_tokens=35 or a block_length"),
        ({"max_new_tokens": 32, "block_length": 64}, "set max_new_tokens=64"),
        (
            {"max_new_tokens": 32, "block_length": 8, "num_unmasking_steps": 10},
            "4 blocks of 8 tokens; use 8 or 12",
        ),
        ({"max_new_tokens": 32, "block_length": 8, "num_unmasking_steps": 2}, "tokens; use 4$"),
    ],
)
def test_bad_settings_name_the_field_and_the_fix_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        SamplingConfig(**settings)
    assert "\n" not in str(error.value)
    assert "sampling." in str(error.value)


def test_a_list_from_a_recipe_becomes_a_tuple():
    assert SamplingConfig(suppress_tokens=[3, 4]).suppress_tokens == (3, 4)


def test_every_field_has_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(SamplingConfig))


def test_names_agree_with_the_functions_behind_them():
    assert set(POLICIES) == set(UNMASKING_POLICIES)
    assert all(sum(transfer_schedule(7, 3, kind)) == 7 for kind in STEP_SCHEDULES)


def test_reading_the_config_adds_no_torch():
    code = """
import sys, memdlm
before = "torch" in sys.modules
import memdlm.sampling.config
sys.exit("torch" in sys.modules and not before)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
