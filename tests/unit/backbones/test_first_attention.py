"""Forwards that keep the first layer's standing part give the logits of whole forwards."""

import pytest
import torch

from memdlm.backbones import first_attention
from memdlm.backbones.first_attention import FirstAttention
from memdlm.backbones.kv_cache import KVCache
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric_memory import ParametricMemory
from tests.families import MASK

ROWS, LENGTH = 3, 14
PADDED = torch.ones(ROWS, LENGTH, dtype=torch.int64)
PADDED[1, 12:] = 0
MASKS = {"none": None, "padding": PADDED}
# What changes: as many columns in every row, or not; side by side, or not.
BEHIND = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
for row, end in enumerate((14, 12, 14)):
    BEHIND[row, end - 4 : end] = True
WITHIN = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
WITHIN[0, [0, 5, 9]] = WITHIN[1, [3]] = WITHIN[2, [1, 2, 12, 13]] = True
CHANGING = {"behind": BEHIND, "within": WITHIN}


@pytest.fixture
def model(build_model, family):
    return build_model(family).eval()


def states(changing, count=3):
    """Return canvases that differ in the columns that change."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 59, (ROWS, LENGTH), generator=generator)
    found = [ids.masked_fill(changing, MASK)]
    for _ in range(count - 1):
        found.append(torch.randint(0, 59, ids.shape, generator=generator).where(changing, ids))
    return found


def widths_of(model):
    """Return a list that fills with the tokens per row of every projection of the first layer."""
    widths: list[int] = []
    attention = model.model.layers[0].self_attn
    projection = getattr(attention, "k_proj", None) or attention.query_key_value
    projection.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    return widths


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("changing", CHANGING)
def test_every_state_gets_its_logits(model, changing, mask):
    changing, mask = CHANGING[changing], MASKS[mask]
    first, widths = FirstAttention(changing), widths_of(model)
    is_real = torch.ones(ROWS, LENGTH).bool() if mask is None else mask.bool()
    for ids in states(changing):
        found = model(ids, attention_mask=mask, first=first).logits
        expected = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(found[is_real], expected[is_real], rtol=1e-4, atol=1e-5)
    # Whole at first, then only what changes; the other forwards are the plain ones.
    assert widths == [LENGTH, LENGTH, 4, LENGTH, 4, LENGTH]


@torch.no_grad()
def test_rows_may_leave(model):
    positions = torch.arange(3).expand(ROWS, -1)
    first = FirstAttention(WITHIN)
    rows = torch.arange(ROWS)
    for ids, leaves in zip(states(WITHIN, 4), (None, [0, 2], None, [1]), strict=True):
        if leaves is not None:
            kept = torch.tensor(leaves)
            first.keep(kept)
            rows = rows[kept]
        arguments = {"attention_mask": PADDED[rows], "positions": positions[rows]}
        found = model(ids[rows], first=first, **arguments).logits
        expected = model(ids[rows], **arguments).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert rows.tolist() == [2]


@torch.no_grad()
def test_a_memory_in_the_first_layer_takes_part(model, traits):
    modules = tuple(name for name in traits.attention if name not in ("o_proj", "dense"))
    config = MemoryConfig(scope="modules", modules=modules, layer_fraction=1.0, learning_rate=5.0)
    memory = ParametricMemory(model, config)
    ids = states(BEHIND)
    memory.write(ids[1][:, :8], seed=0)
    first = FirstAttention(BEHIND)
    with memory.attached():
        for state in ids:
            found, expected = model(state, first=first).logits, model(state).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    without = model(ids[-1]).logits
    assert not torch.allclose(expected, without, atol=1e-3)


@torch.no_grad()
def test_a_mask_that_tells_queries_apart_gets_the_whole_layer(model):
    mask = torch.ones(ROWS, 1, LENGTH, LENGTH).tril().bool()
    first, widths = FirstAttention(BEHIND), widths_of(model)
    for ids in states(BEHIND):
        found = model(ids, attention_mask=mask, first=first).logits
        assert torch.equal(found, model(ids, attention_mask=mask).logits)
    assert set(widths) == {LENGTH}


@torch.no_grad()
def test_a_layer_that_is_first_and_last_is_narrowed(build_model):
    model, positions = build_model("llada", n_layers=1).eval(), torch.arange(4).expand(ROWS, -1)
    first = FirstAttention(BEHIND)
    for ids in states(BEHIND):
        found = model(ids, positions=positions, first=first).logits
        assert torch.equal(found, model(ids, positions=positions).logits)


def test_what_cannot_be_kept_is_refused(build_model):
    model, (ids, *_) = build_model("llada").eval(), states(BEHIND)
    with pytest.raises(ValueError, match="no gradients"):
        model(ids, first=FirstAttention(BEHIND))
    columns = torch.arange(LENGTH).expand(ROWS, -1)
    arguments = {"cache": KVCache(LENGTH), "position_ids": columns, "positions": columns}
    with torch.no_grad(), pytest.raises(ValueError, match="leave out first"):
        model(ids, first=FirstAttention(BEHIND), **arguments)


def test_it_pays_where_most_tokens_stay(build_model, monkeypatch):
    model = build_model("llada").eval()
    assert not FirstAttention.pays(model, BEHIND, PADDED)  # too small
    monkeypatch.setattr(first_attention, "FEWEST_STANDING", 1)
    assert FirstAttention.pays(model, BEHIND, PADDED)
    assert not FirstAttention.pays(model, ~BEHIND, None)  # most change
    alone = BEHIND.clone()
    alone[1] = True
    assert not FirstAttention.pays(model, alone, None)  # nothing stays in a row
    assert not FirstAttention.pays(build_model("llada", n_layers=1), BEHIND, None)
    assert not FirstAttention.pays(model, BEHIND.to("meta"), None)  # no CPU
    assert not FirstAttention.pays(build_model("llada").bfloat16(), BEHIND, None)
    model.set_attn_implementation("eager")
    assert not FirstAttention.pays(model, BEHIND, None)
