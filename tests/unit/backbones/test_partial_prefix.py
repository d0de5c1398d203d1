"""Early layers on chosen columns: what is packed, recorded, put back and refused."""

import pytest
import torch

from memdlm.backbones.base import Interlude
from memdlm.backbones.kv_cache import KeyRecorder, KVCache
from memdlm.backbones.partial_prefix import partial_prefix
from memdlm.backbones.row_columns import RowColumns

CHOSEN = torch.tensor(
    [[0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool
)


def test_rows_are_filled_up_with_columns_that_nobody_reads():
    columns = RowColumns.pack(CHOSEN)
    assert columns.positions[:2].tolist() == [[2, 3, 4, 5], [1, 4, 4, 4]]
    assert columns.slots.tolist() == [[2, 3, 4, 5], [1, 4, 6, 6], [6, 6, 6, 6]]


@pytest.mark.parametrize("shape", [(3, 6, 2), (3, 5, 6, 2)])
def test_chosen_columns_are_put_and_the_rest_stays(shape):
    whole, part = torch.zeros(shape), torch.ones(*shape[:-2], 4, 2)
    result = RowColumns.pack(CHOSEN).put(part, whole)
    expected = CHOSEN.view(3, *(1,) * (len(shape) - 3), 6, 1).expand(shape).float()
    assert torch.equal(result, expected) and not whole.any()


@pytest.mark.parametrize("is_masked", [False, True])
def test_recorded_keys_of_the_same_tokens_give_the_same_states(family, is_masked, build_model):
    model = build_model(family).eval().model
    ids = torch.randint(0, 59, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 5 + [0], [1] * 6]) if is_masked else None
    recorder, columns = KeyRecorder(), RowColumns.pack(CHOSEN)
    found = []

    def compare(hidden, inputs):
        assert inputs.cache is None  # the layers from here on attend as ever
        recorded = recorder.take()
        assert recorded.keys() == {0, 1, 2}
        assert not any(t.requires_grad for pair in recorded.values() for t in pair)
        found.append((partial_prefix(model, ids, inputs, 3, columns, recorded, hidden), hidden))

    model(ids, mask, interlude=Interlude(3, compare, recorder))
    torch.testing.assert_close(*found[0], rtol=1e-5, atol=1e-5)


def test_keys_are_taken_once_and_later_passes_leave_no_trace():
    recorder, key = KeyRecorder(), torch.ones(1, 1, 2, 3)
    assert recorder.update(key, key, 0)[0] is key
    taken = recorder.take()
    recorder.update(key + 1, key, 0)
    recorder.update(key + 1, key, 1)
    assert taken.keys() == {0} and torch.equal(taken[0][0], key)
    with pytest.raises(ValueError, match="taken before"):
        recorder.take()


def test_recording_excludes_a_cache(build_model):
    model = build_model("llada").model
    interlude = Interlude(1, lambda hidden, inputs: None, KeyRecorder())
    with pytest.raises(ValueError, match="excludes a cache"):
        model(torch.zeros(1, 4, dtype=torch.long), interlude=interlude, cache=KVCache(4))
