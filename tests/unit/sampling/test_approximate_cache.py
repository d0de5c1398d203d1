"""Prefix and dual caches: what they approximate, what they save, and that rows stay apart."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.placement import place
from memdlm.sampling.approximate_cache import ApproximateCache
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode
from memdlm.sampling.logits_source import WholeForward

PAD = 59
PLAIN = SamplingConfig(max_new_tokens=12, block_length=4, decoder="masked", stop_at_eos=False)
KINDS = ("prefix", "dual")
BOTH_KINDS = pytest.mark.parametrize("cache", KINDS)


@pytest.fixture(scope="module")
def prompts():
    draws = torch.Generator().manual_seed(2)
    return [torch.randint(0, PAD, (length,), generator=draws) for length in (3, 11, 6)]


@pytest.fixture
def logits_of(monkeypatch):
    """Logits [B, P, V] of every step, in order, whatever asks the model."""
    seen = []
    for source in (WholeForward, ApproximateCache):

        def record(self, *args, own=source.__call__):
            seen.append(own(self, *args))
            return seen[-1]

        monkeypatch.setattr(source, "__call__", record)
    return seen


@BOTH_KINDS
def test_a_step_per_block_makes_it_exact(build_model, family, prompts, logits_of, cache):
    """Then every step renews the cache."""
    model = build_model(family).eval()
    config = replace(PLAIN, num_unmasking_steps=3)
    expected = decode(model, prompts, config)
    logits = list(logits_of)
    logits_of.clear()
    output = decode(model, prompts, replace(config, cache=cache))
    assert torch.equal(output.canvas, expected.canvas)
    for here, there in zip(logits_of, logits, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@BOTH_KINDS
def test_one_layer_makes_it_exact(build_model, family, prompts, logits_of, cache):
    """There, keys and values depend on their own token alone, and those kept do not change."""
    layers = "n_layers" if family == "llada" else "num_hidden_layers"
    model = build_model(family, **{layers: 1}).eval()
    expected = decode(model, prompts, PLAIN)
    logits = list(logits_of)
    logits_of.clear()
    output = decode(model, prompts, replace(PLAIN, cache=cache))
    assert torch.equal(output.canvas, expected.canvas)
    for here, there in zip(logits_of, logits, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


def test_more_layers_make_it_an_approximation(build_model, family, prompts, logits_of):
    model = build_model(family).eval()
    seen = {}
    for cache in ("none", *KINDS):
        logits_of.clear()
        decode(model, prompts, replace(PLAIN, cache=cache))
        seen[cache] = list(logits_of)[:2]  # until here all of them hold the same tokens
    for cache in KINDS:
        torch.testing.assert_close(seen[cache][0], seen["none"][0], rtol=1e-5, atol=1e-5)
        assert (seen[cache][1] - seen["none"][1]).abs().max() > 1e-3
    assert (seen["prefix"][1] - seen["dual"][1]).abs().max() > 1e-3


@BOTH_KINDS
def test_what_a_step_runs(build_model, family, prompts, cache):
    model = build_model(family).eval()
    widths = []
    model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    decode(model, prompts[1:2], replace(PLAIN, cache=cache))
    lead = int(family == "dream")  # the token before the block predicts its first one
    rest = {"prefix": (12, 8, 4), "dual": (4, 4, 4)}[cache]
    assert widths == [width for left in rest for width in (23, *[left + lead] * 3)]


@BOTH_KINDS
@pytest.mark.parametrize("name", ["llada_moe", "dream"])
@pytest.mark.parametrize("with_memory", [False, True], ids=["no memory", "memory"])
@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.1},
        {"guidance_scale": 0.5, "temperature": 0.7, "num_unmasking_steps": 6},
        {"threshold": 0.1, "stop_at_eos": True, "stop_tokens": tuple(range(10))},
    ],
    ids=["threshold", "guidance", "early end"],
)
def test_a_row_gives_what_it_gives_alone(build_model, name, prompts, cache, with_memory, settings):
    model = build_model(name).eval()
    config = replace(PLAIN, cache=cache, **settings)

    def decoded(rows):
        with memories_of(model, rows) if with_memory else nullcontext():
            return decode(model, rows, config)

    together = decoded(prompts)
    shuffled = decoded(prompts[::-1])
    for row, prompt in enumerate(prompts):
        alone = decoded([prompt])
        width = alone.canvas.shape[1]
        assert torch.equal(together.canvas[row, :width], alone.canvas[0])
        assert torch.equal(shuffled.canvas[-1 - row, :width], alone.canvas[0])
        assert torch.equal(together.unmask_step[row, :width], alone.unmask_step[0])


def memories_of(model, prompts):
    """Attach a memory per row whose values depend on that row's prompt alone."""
    config = MemoryConfig(layer_fraction=0.5, rank=4)
    draws = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
    fast = FastWeights(place(model.model, config), config, len(prompts), torch.device("cpu"), draws)
    fast.load(
        {
            name: torch.stack([0.03 * torch.randn(tensor.shape[1:], generator=g) for g in draws])
            for name, tensor in fast.tensors.items()
        }
    )
    return fast.attached(model.model)


@pytest.mark.parametrize("name", ["llada_moe", "dream"])
def test_rows_really_renew_their_caches_at_different_steps(build_model, prompts, name):
    model = build_model(name).eval()
    output = decode(model, prompts, replace(PLAIN, cache="dual", threshold=0.1))
    assert len({len(counts) for counts in output.tokens_per_step}) > 1


@BOTH_KINDS
def test_what_it_cannot_serve_is_refused(build_model, mixing_model, prompts, cache):
    blocks = build_model("llada2", attention="block_causal")
    with pytest.raises(ConfigError, match="needs a backbone with full attention"):
        decode(blocks, prompts, replace(PLAIN, cache=cache))
    with pytest.raises(ConfigError, match="the model is none of memdlm's"):
        decode(mixing_model, prompts, replace(PLAIN, cache=cache))
    with pytest.raises(ConfigError, match="use none with infill"):
        replace(PLAIN, cache=cache, infill=True)
