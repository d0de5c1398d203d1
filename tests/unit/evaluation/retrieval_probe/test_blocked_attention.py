"""Which attention is cut, tried by changing the needle: what cannot be seen changes nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError, DataError
from memdlm.evaluation.retrieval_probe.blocked_attention import BlockedAttention
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from memdlm.sampling.config import SamplingConfig
from memdlm.sampling.decoding import decode

Build = Callable[..., nn.Module]
NUM_SLOTS = 4
LENGTHS = (11, 8)


def a_batch(mask_id: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return a padded canvas, its mask, the slots' columns and the needles, two words each."""
    draws = torch.Generator().manual_seed(0)
    width = max(LENGTHS) + NUM_SLOTS
    ids = torch.full((len(LENGTHS), width), pad_id)
    attention_mask = torch.zeros_like(ids)
    needles = []
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(0, pad_id, (length,), generator=draws)
        ids[row, length : length + NUM_SLOTS] = mask_id
        attention_mask[row, : length + NUM_SLOTS] = 1
        needle = torch.zeros(length, dtype=torch.bool)
        needle[2 + row : 4 + row] = True
        needle[6] = True
        needles.append(needle)
    slots = torch.tensor(LENGTHS)[:, None] + torch.arange(NUM_SLOTS)
    return ids, attention_mask, slots, needles


def with_other_needles(ids: Tensor, needles: list[Tensor]) -> Tensor:
    """Return the canvas with other tokens in the needles' places."""
    other = ids.clone()
    for row, needle in enumerate(needles):
        other[row, : len(needle)][needle] += 1
    return other


def outside(ids: Tensor, needles: list[Tensor]) -> Tensor:
    """Return which columns of real rows are outside of the needles, [B, T]."""
    found = torch.ones_like(ids, dtype=torch.bool)
    for row, needle in enumerate(needles):
        found[row, : len(needle)] = ~needle
        found[row, len(needle) + NUM_SLOTS :] = False
    return found


def pair_by_pair(inputs: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply every (token, expert) pair on its own: `grouped_linear`, rounded as if alone."""
    expert = torch.bucketize(torch.arange(len(inputs)), ends, right=True)
    return torch.stack([weight[e] @ x for e, x in zip(expert.tolist(), inputs, strict=True)])


@torch.no_grad()
def test_no_answer_logit_depends_on_a_needle_that_nobody_may_see(
    build_model: Build, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Needle tokens visit experts together with others; how many do decides how a grouped product
    # rounds, which the last bit of other tokens shows.
    monkeypatch.setattr("memdlm.backbones.experts.grouped_linear", pair_by_pair)
    model = build_model(family, 0).eval()
    ids, mask, slots, needles = a_batch(model.config.mask_token_id, model.config.pad_token_id)
    other = with_other_needles(ids, needles)
    arguments = {"attention_mask": mask, "positions": slots}
    seen = model(ids, **arguments).logits
    assert not torch.allclose(model(other, **arguments).logits, seen, atol=1e-3)
    blocked = BlockedAttention(model, needles, "all").eval()
    cut = blocked(ids, **arguments).logits
    assert torch.equal(blocked(other, **arguments).logits, cut)
    assert not torch.allclose(cut, seen, atol=1e-3)
    # Nor does anything else outside of the needles: other rows, or hidden states on the way there.
    states = [
        torch.stack(blocked(x, attention_mask=mask, output_hidden_states=True).hidden_states)
        for x in (ids, other)
    ]
    free = outside(ids, needles)
    assert torch.equal(states[0][:, free], states[1][:, free])
    assert not torch.equal(states[0][:, ~free], states[1][:, ~free])


@torch.no_grad()
@pytest.mark.parametrize("family_name", ["llada_moe", "llada2"])
def test_grouped_experts_leak_no_more_than_rounding(build_model: Build, family_name: str) -> None:
    model = build_model(family_name, 0).eval()
    ids, mask, slots, needles = a_batch(model.config.mask_token_id, model.config.pad_token_id)
    blocked = BlockedAttention(model, needles, "all").eval()
    first, second = (
        blocked(x, attention_mask=mask, positions=slots).logits
        for x in (ids, with_other_needles(ids, needles))
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_other_tokens_still_count(build_model: Build, family: str) -> None:
    model = build_model(family, 0).eval()
    ids, mask, slots, needles = a_batch(model.config.mask_token_id, model.config.pad_token_id)
    blocked = BlockedAttention(model, needles, "all").eval()
    other = ids.clone()
    other[:, 0] += 1
    logits = [blocked(x, attention_mask=mask, positions=slots).logits for x in (ids, other)]
    assert not torch.allclose(*logits, atol=1e-3)


@torch.no_grad()
def test_with_the_answer_alone_blocked_the_needle_arrives_through_the_prompt(
    build_model: Build, family: str
) -> None:
    """Edges from the answer's rows are cut, and no others: checked in each layer's attention."""
    model = build_model(family, 0).eval()
    lead = int(model.right_shift_logits)
    ids, mask, slots, needles = a_batch(model.config.mask_token_id, model.config.pad_token_id)
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args: seen.append(args[1].attention_mask)
    )
    blocked = BlockedAttention(model, needles, "answer").eval()
    logits = blocked(ids, attention_mask=mask, positions=slots).logits
    handle.remove()
    for row, (length, needle) in enumerate(zip(LENGTHS, needles, strict=True)):
        end = length + NUM_SLOTS
        expected = mask[row].bool().expand(end, -1).clone()
        expected[length - lead :, : len(needle)] &= ~needle
        assert torch.equal(seen[0][row, 0, :end], expected)
    # The other rows of the prompt have read it, so it still matters.
    other = with_other_needles(ids, needles)
    assert not torch.allclose(
        blocked(other, attention_mask=mask, positions=slots).logits, logits, atol=1e-4
    )
    # With one layer, nothing can have travelled yet: the needle does not matter at all.
    sizes = {"n_layers": 1} if family == "llada" else {"num_hidden_layers": 1}
    single = build_model(family, 0, **sizes).eval()
    blocked = BlockedAttention(single, needles, "answer").eval()
    first, second = (blocked(x, attention_mask=mask, positions=slots).logits for x in (ids, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("family_name", "settings"),
    [
        ("llada", {}),
        ("llada", {"block_length": 2, "cache": "prefix"}),
        ("llada", {"block_length": 2, "cache": "dual"}),
        ("dream", {"block_length": 2, "cache": "dual"}),
        ("llada_moe", {"guidance_scale": 1.0}),
        ("llada2", {"block_length": 4, "cache": "exact"}),
        ("llada2", {"block_length": 4, "cache": "none"}),
        ("llada2", {"decoder": "masked"}),
    ],
)
def test_every_way_of_decoding_honours_it(
    build_model: Build, family_name: str, settings: dict[str, object]
) -> None:
    model = build_model(family_name, 0).eval()
    ids, _, _, needles = a_batch(model.config.mask_token_id, model.config.pad_token_id)
    config = SamplingConfig(max_new_tokens=NUM_SLOTS, stop_at_eos=False, **settings)

    def answers(canvas: Tensor, scope: str | None) -> list[list[int]]:
        prompts = [row[:length] for row, length in zip(canvas, LENGTHS, strict=True)]
        asked = model if scope is None else BlockedAttention(model, needles, scope)
        return [tokens.tolist() for tokens in decode(asked, prompts, config).tokens]

    changed = [with_other_needles(ids, needles)]
    changed.append(with_other_needles(changed[0], needles))
    assert any(answers(other, None) != answers(ids, None) for other in changed)
    assert all(answers(other, "all") == answers(ids, "all") for other in changed)


@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_forward(build_model: Build) -> None:
    model = build_model("llada2", 0).eval()
    ids, _, _, needles = a_batch(model.config.mask_token_id, model.config.pad_token_id)
    prompts = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]
    for scope in ("answer", "all"):
        canvases = [
            decode(
                BlockedAttention(model, needles, scope),
                prompts,
                SamplingConfig(max_new_tokens=8, block_length=4, cache=cache, stop_at_eos=False),
            ).canvas
            for cache in ("exact", "none")
        ]
        assert torch.equal(*canvases)


@torch.no_grad()
def test_a_model_that_is_block_causal_by_itself_stays_so(build_model: Build) -> None:
    model = build_model("llada2", 0).eval()
    model.config.attention, model.config.block_length = "block_causal", 4
    ids, mask, _, needles = a_batch(model.config.mask_token_id, model.config.pad_token_id)
    nothing = [torch.zeros_like(needle) for needle in needles]
    whole = model(ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.equal(BlockedAttention(model, nothing, "all")(ids, mask).logits[real], whole[real])


@torch.no_grad()
def test_blocking_nothing_changes_nothing(build_model: Build, family: str) -> None:
    model = build_model(family, 0).eval()
    ids, mask, slots, needles = a_batch(model.config.mask_token_id, model.config.pad_token_id)
    nothing = [torch.zeros_like(needle) for needle in needles]
    for scope in ("answer", "all"):
        blocked = BlockedAttention(model, nothing, scope)
        torch.testing.assert_close(
            blocked(ids, mask, positions=slots).logits,
            model(ids, attention_mask=mask, positions=slots).logits,
        )


def test_a_memory_reaches_the_answer_all_the_same(build_model: Build) -> None:
    model = build_model("llada", 0).eval()
    ids, mask, slots, needles = a_batch(model.config.mask_token_id, model.config.pad_token_id)
    config = MemoryConfig(layer_fraction=0.5, learning_rate=1.0, prompt_mask_ratio=0.5)
    blocked = BlockedAttention(model, needles, "all").eval()
    found = []
    for canvas in (ids, with_other_needles(ids, needles)):
        memory = ParametricMemory(model, config)
        memory.write(canvas, mask)
        with memory.attached(), torch.no_grad():
            found.append(blocked(ids, attention_mask=mask, positions=slots).logits)
    with torch.no_grad():
        without = blocked(ids, attention_mask=mask, positions=slots).logits
    # Written from other needles, the memory says something else to the same blocked canvas.
    assert not torch.allclose(found[0], without, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_what_cannot_be_blocked_is_said(build_model: Build) -> None:
    needle = torch.tensor([False, True, True])
    with pytest.raises(ConfigError, match="scope: 'some' is not one of answer, all"):
        BlockedAttention(build_model("llada", 0), [needle], "some")
    with pytest.raises(ConfigError, match="Linear holds no memdlm backbone"):
        BlockedAttention(nn.Linear(2, 2), [needle], "all")
    BlockedAttention(build_model("llada", 0), [needle], "all")
    with pytest.raises(DataError, match="row 0: the needle is the end of the prompt"):
        BlockedAttention(build_model("dream", 0), [needle], "all")
    blocked = BlockedAttention(build_model("llada", 0), [needle], "all")
    with pytest.raises(ValueError, match="2 rows for 1 needles"):
        blocked(torch.zeros((2, 5), dtype=torch.int64))
