"""Block decoding: an exact cache, rows at their own pace, editing, and what is refused."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from memdlm.errors import ConfigError, UsageError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.placement import place
from memdlm.sampling import block_causal, block_decoding
from memdlm.sampling.canvas import block_canvas
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode

BLOCK, NEW, PAD, MASK = 4, 10, 59, 60
# Within the first block, at its end, beyond it, and some blocks further.
LENGTHS = (3, 4, 18, 5)
PLAIN = SamplingConfig(max_new_tokens=NEW, block_length=BLOCK, decoder="block", stop_at_eos=False)
SETTINGS = {
    "a token a step": {},
    "low threshold": {"threshold": 0.2},
    "editing": {"threshold": 0.3, "editing_threshold": 0.2, "max_editing_steps": 3},
    "two per step": {"min_tokens_per_step": 2, "policy": "margin", "threshold": 0.9},
    "few steps": {"num_unmasking_steps": 6, "policy": "entropy"},
    "temperature": {"temperature": 0.8, "top_p": 0.8, "threshold": 0.4},
    "editing at temperature": {"temperature": 0.5, "threshold": 0.3, "editing_threshold": 0.3},
    "early end": {"threshold": 0.2, "stop_at_eos": True, "stop_tokens": tuple(range(20))},
    "edited end": {
        "threshold": 0.2,
        "editing_threshold": 0.2,
        "stop_at_eos": True,
        "stop_tokens": tuple(range(20)),
    },
    "late end": {"stop_at_eos": True, "stop_tokens": tuple(range(20)), "min_new_tokens": 7},
}
CACHES = ("none", "exact")


@pytest.fixture
def model(build_model):
    return build_model("llada2").eval()


@pytest.fixture(scope="module")
def prompts():
    draws = torch.Generator().manual_seed(5)
    return [torch.randint(0, PAD, (length,), generator=draws) for length in LENGTHS]


@pytest.fixture
def seen(monkeypatch):
    """Logits [P, V] and block by (row, step of the row), of every decode until cleared."""
    logits_by_step = {}
    predict = block_decoding.BlockDecode._predict

    def record(self, logits, index):
        for row, count in enumerate(self.progress.counts()):
            if count:
                logits_by_step[row, self.progress.num_steps_taken[row]] = SimpleNamespace(
                    logits=logits[row].clone(), start=self.progress.starts()[row]
                )
        return predict(self, logits, index)

    monkeypatch.setattr(block_decoding.BlockDecode, "_predict", record)
    return logits_by_step


def assert_close(here, there):
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


def memories_of(model, prompts):
    """Attach a memory per row whose values depend on that row's prompt alone."""
    config = MemoryConfig(layer_fraction=0.5, rank=4)
    draws = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
    placement = place(model.model, config)
    fast = FastWeights(placement, config, len(prompts), torch.device("cpu"), draws)
    values = {
        name: torch.stack([0.03 * torch.randn(tensor.shape[1:], generator=own) for own in draws])
        for name, tensor in fast.tensors.items()
    }
    fast.load(values)
    return fast.attached(model.model)


def check_same(row, output, row_alone, alone):
    width = min(output.canvas.shape[1], alone.canvas.shape[1])
    assert torch.equal(output.tokens[row], alone.tokens[row_alone])
    assert torch.equal(output.canvas[row, :width], alone.canvas[row_alone, :width])
    assert torch.equal(output.unmask_step[row, :width], alone.unmask_step[row_alone, :width])
    assert output.tokens_per_step[row] == alone.tokens_per_step[row_alone]
    assert output.ended[row] == alone.ended[row_alone]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_exact_cache_changes_no_token(model, prompts, seen, settings):
    config = replace(PLAIN, **settings)
    for prompt in prompts[1:]:
        seen.clear()
        without = decode(model, [prompt], replace(config, cache="none"))
        expected = dict(seen)
        seen.clear()
        cached = decode(model, [prompt], replace(config, cache="exact"))
        check_same(0, cached, 0, without)
        assert cached.num_forwards == without.num_forwards
        assert seen.keys() == expected.keys()
        for step, here in seen.items():
            assert_close(here.logits, expected[step].logits)


@pytest.mark.parametrize(
    ("name", "cache", "with_memory"),
    [
        *[(name, "exact", True) for name in SETTINGS],
        *[("editing at temperature", "exact", False), ("early end", "exact", False)],
        *[("editing at temperature", "none", True), ("early end", "none", False)],
    ],
)
def test_a_row_gives_what_it_gives_alone(model, prompts, seen, name, cache, with_memory):
    config = replace(PLAIN, cache=cache, **SETTINGS[name])

    def decoded(rows):
        with memories_of(model, rows) if with_memory else nullcontext():
            return decode(model, rows, config)

    order = [2, 0, 1]
    seen.clear()
    together = decoded([prompts[i] for i in order])
    logits_together = dict(seen)
    for row, i in enumerate(order):
        seen.clear()
        alone = decoded([prompts[i]])
        check_same(row, together, 0, alone)
        for (_, step), there in seen.items():
            assert_close(logits_together[row, step].logits, there.logits)


def test_a_memory_changes_what_is_decoded(model, prompts):
    """Otherwise the test above would hold for a memory that never reaches the model."""
    with memories_of(model, prompts):
        within = decode(model, prompts, PLAIN)
    without = decode(model, prompts, PLAIN)
    for here, there in zip(within.tokens, without.tokens, strict=True):
        assert not torch.equal(here, there)


def test_every_step_predicts_what_the_whole_block_causal_forward_predicts(model, prompts, seen):
    """The definition, with nothing shared: the model's own mask, the canvas of the step before."""
    model.config.block_length = BLOCK
    config = replace(PLAIN, threshold=0.3, editing_threshold=0.2, cache="exact")
    prompt = prompts[3]
    canvas = block_canvas([prompt], NEW, BLOCK, MASK, PAD).tokens
    states = [canvas]
    output = decode(model, [prompt], config, on_step=lambda step: states.append(step.canvas))
    model.config.attention = "block_causal"
    with torch.no_grad():
        for step in range(output.num_forwards):
            start = seen[0, step].start
            expected = model(states[step]).logits[0, start : start + BLOCK]
            assert_close(seen[0, step].logits, expected)
    assert {record.start for record in seen.values()} == {4, 8, 12}


def test_a_step_runs_one_block_once_the_prompt_is_read(model, prompts):
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(args[0].shape[1]), with_kwargs=True
    )
    decode(model, [prompts[2]], replace(PLAIN, cache="exact"))
    # 18 tokens reach into the fifth block; a block just finished is run along with the next.
    assert widths == [20, 4, *[8, 4, 4, 4] * 2]
    widths.clear()
    decode(model, prompts, replace(PLAIN, cache="exact", threshold=0.2))
    assert widths[0] == 20
    assert set(widths[1:]) <= {4, 8}
    widths.clear()
    decode(model, [prompts[2]], replace(PLAIN, cache="none"))
    assert widths == [20] * 2 + [24] * 4 + [28] * 4


def test_a_long_prompt_is_read_in_portions(model, prompts, monkeypatch, seen):
    longest = torch.cat([prompts[2]] * 2)
    rows = [longest, *prompts]
    expected = decode(model, rows, replace(PLAIN, threshold=0.2))
    logits = dict(seen)
    seen.clear()
    monkeypatch.setattr(block_causal, "PORTION", 11)
    widths = []
    model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    output = decode(model, rows, replace(PLAIN, threshold=0.2))
    # 36 columns before the first block: portions of 8, as 11 is no multiple of 4, and 4 with it.
    assert widths[:6] == [8, 8, 8, 8, 4 + 4, 4]
    assert output.num_forwards == len(widths) == expected.num_forwards + 4
    assert torch.equal(output.canvas, expected.canvas)
    assert torch.equal(output.unmask_step, expected.unmask_step)
    for key, record in seen.items():
        assert_close(record.logits, logits[key].logits)


def test_the_declared_attention_neither_matters_nor_changes(model, prompts):
    expected = decode(model, prompts, PLAIN)
    for attention in ("full", "block_causal"):
        for cache in ("none", "exact"):
            model.config.attention = attention
            output = decode(model, prompts, replace(PLAIN, cache=cache))
            assert torch.equal(output.canvas, expected.canvas)
            assert model.config.attention == attention


def test_an_adapter_around_attention_works_with_the_cache(model, prompts):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model, LoraConfig(target_modules=["query_key_value", "dense"], init_lora_weights=False)
    ).eval()
    without = decode(adapted, prompts, replace(PLAIN, cache="none"))
    cached = decode(adapted, prompts, replace(PLAIN, cache="exact"))
    assert torch.equal(cached.canvas, without.canvas)
    with adapted.disable_adapter():
        plain = decode(adapted, prompts, replace(PLAIN, cache="exact"))
    assert not torch.equal(plain.canvas, cached.canvas)


def test_threads_decode_on_one_model(model, prompts):
    config = replace(PLAIN, threshold=0.3, temperature=0.5)
    jobs = [([prompt], replace(config, cache=cache)) for prompt in prompts for cache in CACHES]
    alone = [decode(model, *job).canvas for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = pool.map(lambda job: decode(model, *job).canvas, jobs)
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_editing_replaces_tokens_and_never_the_prompt(model, prompts):
    edits = 0
    config = replace(PLAIN, threshold=0.3, editing_threshold=0.2)
    states = [block_canvas(prompts, NEW, BLOCK, MASK, PAD).tokens]
    steps = []
    output = decode(
        model, prompts, config, on_step=lambda s: (states.append(s.canvas), steps.append(s))
    )
    for step, (before, after) in zip(steps, pairwise(states), strict=True):
        changed = before != after
        assert torch.equal(changed & (before == MASK), step.committed)
        edits += int((changed & (before != MASK)).sum())
        for row, end in enumerate(step.final):
            stands = after[row, :end]
            assert torch.equal(stands[stands != MASK], output.canvas[row, :end][stands != MASK])
    for row, prompt in enumerate(prompts):
        assert torch.equal(output.canvas[row, : len(prompt)], prompt)
    assert edits > 5
    assert steps[-1].final == [16, 16, 28, 16]


def test_editing_steps_are_limited(model, prompts):
    config = replace(PLAIN, editing_threshold=0.01, threshold=0.01)
    counts = []
    for limit in (0, 2, 5):
        output = decode(model, prompts[:1], replace(config, max_editing_steps=limit))
        counts.append(output.num_forwards)
        assert len(output.tokens_per_step[0]) == output.num_forwards
    # Every block is filled in one step, and may then be edited for as long as it changes.
    assert counts[0] == 4
    assert 4 < counts[1] <= 4 * 3
    assert counts[1] <= counts[2] <= 4 * 6


def test_an_early_end_saves_steps_and_changes_no_answer(model, prompts):
    for editing_threshold in (None, 0.3):
        config = replace(PLAIN, editing_threshold=editing_threshold, max_editing_steps=4)
        full = decode(model, prompts, config)
        ends = {int(tokens[3]) for tokens in full.tokens}
        config = replace(config, stop_at_eos=True, stop_tokens=tuple(ends))
        stopped = decode(model, prompts, config)
        late = decode(model, prompts, replace(config, stop_early=False))
        assert all(stopped.ended)
        assert [len(tokens) <= 3 for tokens in stopped.tokens] == [True] * len(prompts)
        for here, there in zip(stopped.tokens, late.tokens, strict=True):
            assert torch.equal(here, there)
        assert stopped.num_forwards < late.num_forwards
        assert torch.equal(late.canvas, full.canvas)


def test_the_family_decides_where_the_config_does_not(build_model, prompts):
    config = SamplingConfig(max_new_tokens=8, block_length=4, stop_at_eos=False)
    models = {name: build_model(name).eval() for name in ("llada", "llada_moe", "dream", "llada2")}
    for name, model in models.items():
        kind = "block" if name == "llada2" else "masked"
        expected = decode(model, prompts, replace(config, decoder=kind))
        assert torch.equal(decode(model, prompts, config).canvas, expected.canvas)
    masked = decode(models["llada2"], prompts, replace(config, decoder="masked"))
    blocks = decode(models["llada2"], prompts, config)
    assert [len(t) for t in masked.tokens] == [len(t) for t in blocks.tokens] == [8] * 4
    assert any(
        not torch.equal(here, there)
        for here, there in zip(masked.tokens, blocks.tokens, strict=True)
    )


def test_the_models_block_length_and_a_threshold_are_the_defaults(model, prompts):
    model.config.block_length = 8
    config = SamplingConfig(max_new_tokens=NEW, stop_at_eos=False)
    expected = replace(
        config, decoder="block", block_length=8, threshold=0.95, num_unmasking_steps=16
    )
    output = decode(model, prompts, config)
    assert torch.equal(output.unmask_step, decode(model, prompts, expected).unmask_step)
    assert output.canvas.shape[1] == 32


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llada", {"decoder": "block"}, "block needs a model with block-causal attention"),
        ("llada", {"editing_threshold": 0.9}, "sampling.editing_threshold: 0.9 is not possible"),
        ("llada", {"cache": "exact"}, "sampling.cache: 'exact' is not possible in masked"),
        ("dream", {"min_tokens_per_step": 2}, "sampling.min_tokens_per_step: 2 is not possible"),
        ("llada2", {"guidance_scale": 1.0}, "sampling.guidance_scale: 1.0 is not possible in bl"),
        ("llada2", {"cache": "dual"}, "set sampling.decoder: masked or leave it out"),
        ("llada2", {"infill": True}, "sampling.infill: True is not possible in block"),
        ("llada2", {"policy": "independent"}, "sampling.policy: 'independent' is not possible"),
    ],
)
def test_what_a_model_cannot_do_is_refused(build_model, prompts, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        decode(build_model(name), prompts, SamplingConfig(max_new_tokens=8, **settings))


def test_a_prompt_beyond_the_context_is_refused(model):
    with pytest.raises(UsageError, match="cut the prompt to 54 tokens or lower max_new_tokens"):
        decode(model, [torch.zeros(55, dtype=torch.int64)], PLAIN)
