"""Dream: logits stand where their tokens do, although the checkpoint predicts the next one."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from memdlm import MemoryConfig, ParametricMemory
from memdlm.backbones.dream import DreamConfig, DreamForMaskedLM
from memdlm.backbones.loading import load_model


@pytest.fixture
def golden(fixtures):
    """The official model's inputs and what its own forward returned: logits not shifted."""
    folder = fixtures / "backbones" / "dream"
    inputs, outputs = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "outputs"))
    return load_model(folder), inputs["nopad.input_ids"], outputs["nopad.logits"]


def test_logits_are_the_official_ones_moved_one_to_the_right(golden):
    model, ids, official = golden
    logits = model(ids).logits
    torch.testing.assert_close(logits[:, 1:], official[:, :-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[:, 0], official[:, 0], rtol=0, atol=1e-4)
    assert not torch.allclose(logits[:, 1:], official[:, 1:], atol=1e-1)


def test_positions_name_tokens_and_not_their_predecessors(golden):
    model, ids, official = golden
    positions = torch.tensor([[0, 1, 7, 23], [5, 2, 2, 19]])
    logits = model(ids, positions=positions).logits
    for row in range(2):
        for place, position in enumerate(positions[row].tolist()):
            expected = official[row, max(position - 1, 0)]
            torch.testing.assert_close(logits[row, place], expected, rtol=0, atol=1e-4)


def test_the_loss_compares_each_token_with_its_own_logits(golden):
    model, ids, official = golden
    labels = ids.clone()
    labels[:, 0] = -100  # nothing precedes the first token
    expected = F.cross_entropy(official[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=labels).loss, expected, rtol=1e-5, atol=1e-5)


def test_an_instance_can_give_the_official_logits(golden):
    model, ids, official = golden
    model.right_shift_logits = False
    torch.testing.assert_close(model(ids).logits, official, rtol=0, atol=1e-4)
    assert DreamForMaskedLM.right_shift_logits


def test_hidden_states_stay_where_they_were_computed(golden):
    model, ids, official = golden
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.lm_head(hidden), official, rtol=0, atol=1e-4)


def test_only_queries_keys_and_values_have_biases(build_model):
    biases = {
        name.split(".", 3)[-1] for name in build_model("dream").state_dict() if "bias" in name
    }
    assert biases == {f"self_attn.{part}_proj.bias" for part in "qkv"}


def test_a_padded_query_attends_to_the_real_keys_and_stays_finite(build_model):
    model = build_model("dream").bfloat16()
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    assert model(ids, attention_mask=mask).logits.isfinite().all()


def test_the_inner_loop_learns_the_aligned_tokens(build_model):
    ids = torch.randint(0, 59, (1, 24), generator=torch.Generator().manual_seed(3))
    config = MemoryConfig(
        rank=8,
        alpha=16.0,
        layer_fraction=0.5,
        num_epochs=20,
        learning_rate=0.3,
        prompt_mask_ratio=0.5,
    )
    model = build_model("dream").eval()
    noisy = ids.clone()
    noisy[:, 1::3] = model.config.mask_token_id
    losses = {}
    for is_aligned in (True, False):  # written to predict each token, or the one after it
        memory = ParametricMemory(model, config)
        model.right_shift_logits = is_aligned
        memory.write(ids)
        model.right_shift_logits = True
        with torch.no_grad(), memory.attached():
            logits = model(noisy).logits[:, 1::3].flatten(0, 1)
        losses[is_aligned] = F.cross_entropy(logits, ids[:, 1::3].flatten()).item()
    with torch.no_grad():
        logits = model(noisy).logits[:, 1::3].flatten(0, 1)
    before = F.cross_entropy(logits, ids[:, 1::3].flatten()).item()
    assert losses[True] < 0.85 * before < 0.85 * losses[False]


def test_the_class_is_the_official_one():
    assert DreamForMaskedLM.__name__ == "DreamModel"
    assert DreamConfig.model_type == "Dream"
