"""From prompts to tokens: `decode`, and `decode_steps` for those who want to see every step.

Shapes: `B` rows, `P` slots of a block, `V` vocabulary.
"""

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor, nn

from memdlm.sampling.block_decoding import BlockDecode
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoders import choose_decoder
from memdlm.sampling.end_of_text import IsComplete
from memdlm.sampling.evaluation_mode import evaluation_mode
from memdlm.sampling.masked_decoding import DecodeOutput, DecodeStep, MaskedDecode
from memdlm.sampling.token_choice import Draw


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Tensor],
    config: SamplingConfig | None = None,
    *,
    on_step: Callable[[DecodeStep], None] | None = None,
    draw: Draw | None = None,
    is_complete: IsComplete | None = None,
) -> DecodeOutput:
    """Decode every prompt; a row's tokens do not depend on the other rows.

    Runs in evaluation mode without gradients; the mode of every submodule and the global random
    state are afterwards as before. Several threads may decode on one model at once.

    Args:
        model: A masked model: `model(ids, attention_mask=..., positions=[B, P]).logits` [B, P, V].
            Rows that are done leave its forwards: one that keeps something per row asks
            `memdlm.backbones.batch_rows.present_rows` whose tokens it has.
        prompts: One 1-D int64 tensor of token ids per row.
        config: Settings; None for the defaults.
        on_step: Called after every step, for progress and traces.
        draw: Source of uniform numbers; None gives every row its own generator seeded with
            `config.seed`. Pass `row_draws(seeds, device)` for one seed per row.
        is_complete: Ends rows besides end-of-text tokens, where `config.stop_early` lets rows go;
            not with `config.infill`.

    Raises:
        UsageError: An empty prompt, a prompt whose canvas exceeds the model's context, or
            `is_complete` for infilled ones.
        ConfigError: The model lacks a token id the decode needs, or `config` names a token beyond
            its vocabulary.
        NonFiniteError: The model's logits are nan or inf.
    """
    steps = decode_steps(model, prompts, config, draw=draw, is_complete=is_complete)
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            output: DecodeOutput = end.value
            return output
        if on_step is not None:
            on_step(step)


@torch.no_grad()
def decode_steps(
    model: nn.Module,
    prompts: Sequence[Tensor],
    config: SamplingConfig | None = None,
    *,
    draw: Draw | None = None,
    is_complete: IsComplete | None = None,
) -> Generator[DecodeStep, None, DecodeOutput]:
    """Yield every step of `decode` and return its output; arguments and errors as there.

    Between two steps the model stays in evaluation mode. Closing the generator ends the decode.
    """
    config = config or SamplingConfig()
    kind = BlockDecode if choose_decoder(model, config) == "block" else MaskedDecode
    with evaluation_mode(model):
        return (yield from kind(model, prompts, config, draw, is_complete).run())
