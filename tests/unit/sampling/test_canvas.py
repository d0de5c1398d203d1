import pytest
import torch

from memdlm.errors import UsageError
from memdlm.sampling.canvas import infill_canvas, prompt_canvas


def test_shorter_prompts_are_padded_on_the_right_behind_their_slots():
    canvas = prompt_canvas([torch.tensor([1, 2, 3]), torch.tensor([4])], 2, 9, 8)
    assert canvas.tokens.tolist() == [[1, 2, 3, 9, 9], [4, 9, 9, 8, 8]]
    assert canvas.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert canvas.slots.tolist() == [[False] * 3 + [True] * 2, [False, True, True, False, False]]
    assert canvas.slot_positions().tolist() == [[3, 4], [1, 2]]


def test_no_attention_mask_when_no_row_is_padded():
    assert (
        prompt_canvas([torch.tensor([1, 2]), torch.tensor([3, 4])], 2, 9, 8).attention_mask is None
    )


def test_a_mask_token_in_a_prompt_is_no_slot():
    canvas = prompt_canvas([torch.tensor([1, 9, 2])], 1, 9, 8)
    assert canvas.slot_positions().tolist() == [[3]]


def test_in_an_infill_canvas_the_mask_tokens_are_the_slots():
    canvas = infill_canvas([torch.tensor([1, 9, 2, 9]), torch.tensor([9, 3])], 9, 8)
    assert canvas.tokens.tolist() == [[1, 9, 2, 9], [9, 3, 8, 8]]
    assert canvas.slots.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert canvas.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert canvas.lengths == (4, 2)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([torch.tensor([1]), torch.tensor([], dtype=torch.int64)], "prompt 1 is empty"),
        ([torch.tensor([[1]])], r"prompt 0 .* shape \(1, 1\).* 1-D int64"),
        ([torch.tensor([1.0])], "prompt 0 is a torch.float32"),
    ],
)
def test_unusable_prompts_are_refused(prompts, message):
    with pytest.raises(UsageError, match=message):
        prompt_canvas(prompts, 2, 9, 8)
