"""Settings of block decoding and of caches: ranges, contradictions, and the canvas they lead to."""

import pytest
import torch

from memdlm.errors import ConfigError, UsageError
from memdlm.sampling.block_progress import block_schedule
from memdlm.sampling.canvas import block_canvas
from memdlm.sampling.config import SamplingConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "diffusion"}, "sampling.decoder: 'diffusion' is not valid; choose one of"),
        ({"cache": "kv"}, "sampling.cache: 'kv' is not valid; choose one of auto, none, exact"),
        ({"min_tokens_per_step": 0}, "sampling.min_tokens_per_step: 0 is not valid"),
        ({"editing_threshold": float("nan")}, "sampling.editing_threshold: nan is not valid"),
        ({"editing_threshold": 0.0}, "use a finite number above 0 and at most 1"),
        ({"max_editing_steps": -1}, "sampling.max_editing_steps: -1 is not valid"),
        ({"max_editing_steps": 10**9}, "use an integer from 0 to 1000000"),
        ({"abandon_block_at_eos": 1}, "sampling.abandon_block_at_eos: 1 is not valid"),
        ({"decoder": "masked", "cache": "exact"}, "use it with decoder=block, or leave it out"),
        ({"decoder": "masked", "editing_threshold": 0.9}, "use it with decoder=block"),
        ({"decoder": "block", "cache": "prefix"}, "use it with decoder=masked, or leave it out"),
        ({"decoder": "block", "guidance_scale": 1.0}, "use it with decoder=masked"),
        (
            {"min_tokens_per_step": 2, "num_unmasking_steps": 8},
            "num_unmasking_steps=8 says the same; give one of them",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**settings)


def test_a_block_need_not_divide_the_new_tokens_of_block_decoding():
    SamplingConfig(max_new_tokens=20, block_length=32, decoder="block")
    with pytest.raises(ConfigError, match="32 does not divide max_new_tokens=20"):
        SamplingConfig(max_new_tokens=20, block_length=32, decoder="masked")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1] * 8),
        ({"num_unmasking_steps": 9}, [3, 3, 2]),  # 22 new tokens: three blocks of three steps
        ({"num_unmasking_steps": 48}, [1] * 8),  # steps that commit nothing are not run
        ({"min_tokens_per_step": 3}, [3, 3, 3]),
        ({"min_tokens_per_step": 20}, [20]),
    ],
)
def test_the_schedule_of_a_block(settings, expected):
    config = SamplingConfig(max_new_tokens=22, decoder="block", **settings)
    assert block_schedule(8, config) == expected


def test_a_block_canvas_is_a_whole_number_of_blocks():
    prompts = [torch.arange(1, 1 + length) for length in (1, 3, 4)]
    canvas = block_canvas(prompts, 5, 4, mask_token_id=90, pad_token_id=91)
    assert canvas.lengths == (8, 8, 12)
    assert canvas.tokens.tolist() == [
        [1, *[90] * 7, *[91] * 4],
        [1, 2, 3, *[90] * 5, *[91] * 4],
        [1, 2, 3, 4, *[90] * 8],
    ]
    assert torch.equal(canvas.slots, canvas.tokens == 90)
    with pytest.raises(UsageError, match="prompt 0 is empty"):
        block_canvas([prompts[0][:0]], 5, 4, mask_token_id=90, pad_token_id=91)
