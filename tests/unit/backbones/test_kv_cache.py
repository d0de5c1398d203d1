"""A forward over some positions with a cache gives what the whole forward gives there."""

import pytest
import torch

from memdlm.backbones.kv_cache import KVCache

LENGTH, BLOCK = 16, 4


def block_causal(queries, length, block=BLOCK):
    return (torch.arange(length) // block <= queries[:, :, None] // block)[:, None]


@pytest.fixture
def model(build_model, family):
    return build_model(family).eval()


def tokens_of(rows=2, seed=0):
    return torch.randint(0, 59, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def forward(model, cache, ids, starts, width, mask, positions=None, length=LENGTH):
    """Forward `width` tokens of each row from `starts`; logits of all, or at `positions`."""
    index = starts[:, None] + torch.arange(width)
    cache.open(index, length)
    within = torch.arange(width).expand_as(index) if positions is None else positions
    return model(
        ids.gather(1, index),
        attention_mask=mask,
        position_ids=index,
        positions=within,
        cache=cache,
    ).logits


@torch.no_grad()
def test_blocks_one_after_the_other_give_the_logits_of_the_whole_sequence(model):
    ids = tokens_of()
    whole = torch.arange(LENGTH).expand_as(ids)
    expected = model(ids, attention_mask=block_causal(whole, LENGTH)).logits
    cache = KVCache(LENGTH)
    shift = int(model.right_shift_logits)
    for start in range(0, LENGTH, BLOCK):
        # A family that predicts from the token before gets that token as a first query.
        lead = shift if start else 0
        starts = torch.full((2,), start - lead)
        index = starts[:, None] + torch.arange(BLOCK + lead)
        mask = block_causal(index, start + BLOCK)
        positions = torch.arange(lead, BLOCK + lead).expand(2, -1)
        logits = forward(
            model, cache, ids, starts, BLOCK + lead, mask, positions, length=start + BLOCK
        )
        torch.testing.assert_close(logits, expected[:, start : start + BLOCK], rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_may_stand_at_different_positions_and_pad_their_keys(model):
    ids, mask = tokens_of(), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, 13:] = 0
    expected = model(ids, attention_mask=mask).logits
    cache = KVCache(LENGTH)
    starts = torch.tensor([0, 0])
    torch.testing.assert_close(
        forward(model, cache, ids, starts, LENGTH, mask), expected, rtol=0, atol=1e-5
    )
    starts, positions = torch.tensor([3, 7]), torch.arange(1, 5).expand(2, -1)
    again = forward(model, cache, ids, starts, 5, mask, positions)
    at = starts[:, None] + positions
    expected = expected.gather(1, at[..., None].expand(-1, -1, expected.shape[-1]))
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_a_later_forward_writes_replaces_what_was_there(model):
    ids, other = tokens_of(), tokens_of(seed=1)
    zero = torch.zeros(2, dtype=torch.int64)
    cache = KVCache(LENGTH)
    forward(model, cache, other, zero, LENGTH, None)
    forward(model, cache, ids, zero, LENGTH, None)
    logits = forward(model, cache, ids, zero, 5, None)
    torch.testing.assert_close(logits, model(ids).logits[:, :5], rtol=0, atol=1e-5)


@torch.no_grad()
def test_stale_keys_matter(model):
    """Otherwise the tests above would hold for a cache that is never read."""
    ids, other = tokens_of(), tokens_of(seed=1)
    zero = torch.zeros(2, dtype=torch.int64)
    cache = KVCache(LENGTH)
    forward(model, cache, other, zero, LENGTH, None)
    logits = forward(model, cache, ids, zero, 5, None)
    assert (logits - model(ids).logits[:, :5]).abs().max() > 1e-2


@torch.no_grad()
def test_a_forward_that_was_not_announced_is_refused(model):
    ids = tokens_of()
    index = torch.arange(4).expand(2, -1)
    cache = KVCache(LENGTH)
    arguments = {"position_ids": index, "positions": index, "cache": cache}
    with pytest.raises(ValueError, match="call open"):
        model(ids[:, :4], **arguments)
    cache.open(torch.arange(5).expand(2, -1), LENGTH)
    with pytest.raises(ValueError, match="expects \\(2, 5\\) query tokens"):
        model(ids[:, :4], **arguments)
    for missing in ("position_ids", "positions"):
        with pytest.raises(ValueError, match="a cache needs position_ids and positions"):
            model(ids[:, :4], **{**arguments, missing: None})


@torch.no_grad()
def test_it_serves_eager_attention_and_half_precision_too(build_model, family):
    model = build_model(family).eval()
    model.set_attn_implementation("eager")
    model = model.to(torch.bfloat16)
    ids, zero = tokens_of(), torch.zeros(2, dtype=torch.int64)
    cache = KVCache(LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    forward(model, cache, ids, zero, LENGTH, mask)
    logits = forward(model, cache, ids, zero, 5, mask)
    assert logits.dtype == torch.bfloat16
    # Routers may tip over in half precision, so only most positions are compared.
    close = (logits - model(ids).logits[:, :5]).abs().amax(dim=-1) < 0.1
    assert close.float().mean() > 0.7
    layers = model.config.num_hidden_layers
    heads = model.config.num_key_value_heads or model.config.num_attention_heads
    assert cache.num_bytes == layers * 2 * 2 * heads * LENGTH * model.config.head_dim * 2


@torch.no_grad()
def test_rows_may_leave(model):
    ids, rest = tokens_of(rows=3), torch.tensor([2, 0])
    columns = torch.arange(LENGTH)
    cache = KVCache(LENGTH)
    kept = KVCache(LENGTH)
    for start in (0, BLOCK):
        if start:
            kept.keep(rest)
        rows = ids[rest] if start else ids
        for one, given in ((cache, ids), (kept, rows)):
            starts = torch.full((len(given),), start)
            index = starts[:, None] + columns[:BLOCK]
            mask = block_causal(index, start + BLOCK)
            logits = forward(model, one, given, starts, BLOCK, mask, length=start + BLOCK)
            if one is cache:
                expected = logits
    torch.testing.assert_close(logits, expected[rest], rtol=0, atol=1e-5)
