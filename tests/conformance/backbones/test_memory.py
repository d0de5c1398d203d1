"""A memory on every family: written per row, attached, erased, the model as it was."""

import pytest
import torch

from memdlm import MemoryConfig, ParametricMemory


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_each_row_learns_as_if_alone_and_erasing_leaves_nothing(family, kind, build_model):
    model = build_model(family).double().eval()
    lengths = (14, 9, 5)
    draws = torch.Generator().manual_seed(0)
    ids = torch.full((3, 14), 59)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(0, 59, (length,), generator=draws)
    mask = (torch.arange(14) < torch.tensor(lengths)[:, None]).long()
    config = MemoryConfig(
        kind=kind, rank=3, alpha=6.0, layer_fraction=0.5, scope="ffn_attention", sharing="sequence"
    )
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        memory = ParametricMemory(model, config)
        memory.write(ids, mask)
        with memory.attached():
            together = model(ids, attention_mask=mask).logits
        memory.erase()
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
        for row, length in enumerate(lengths):
            one = ids[row, None, :length]
            alone = ParametricMemory(model, config)
            alone.write(one)
            with alone.attached():
                logits = model(one).logits[0]
            difference = (together[row, :length] - logits).abs().max()
            assert difference <= 1e-6
            assert not torch.allclose(logits, plain[row, :length])
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
