"""Head and loss in chunks: the same numbers as all at once, and logits of one chunk at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memdlm.backbones.token_losses import Scored, weighted_nll, weighted_sum

WIDTH, VOCABULARY, NUM = 12, 50, 23


def inputs(num: int = NUM, *, trains_head: bool = True, scale: float = 1.0):
    draws = torch.Generator().manual_seed(3)
    hidden = torch.randn(num, WIDTH, generator=draws).requires_grad_()
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(trains_head)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=draws))
    labels = torch.randint(VOCABULARY, (num,), generator=draws)
    weights = torch.rand(num, generator=draws) * scale
    return hidden, head, labels, weights


def budget_for(tokens: int) -> int:
    return 4 * VOCABULARY * tokens


@pytest.mark.parametrize("tokens", [1, 4, NUM - 1, NUM, 1000])
@pytest.mark.parametrize("trains_head", [True, False])
def test_chunks_change_neither_loss_nor_gradients(tokens, trains_head) -> None:
    hidden, head, labels, weights = inputs(trains_head=trains_head)
    leaves = [hidden, *([head.weight] if trains_head else [])]
    nll = F.cross_entropy(head(hidden), labels, reduction="none")
    expected = torch.autograd.grad(0.5 * (nll * weights).sum(), leaves)

    scored = Scored(labels, weights, budget_for(tokens))
    total, losses, logits = weighted_nll(hidden, head, VOCABULARY, scored)
    grads = torch.autograd.grad(0.5 * total, leaves)
    assert logits is None and not losses.requires_grad
    torch.testing.assert_close(losses, nll.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total, (nll * weights).sum(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_one_chunk_is_the_plain_loss_to_the_bit() -> None:
    hidden, head, labels, weights = inputs()
    nll = F.cross_entropy(head(hidden), labels, reduction="none")
    expected = torch.autograd.grad((nll * weights).sum(), [hidden, head.weight])
    total, _, _ = weighted_nll(hidden, head, VOCABULARY, Scored(labels, weights, 1 << 30))
    assert torch.equal(total, (nll * weights).sum())
    for ours, theirs in zip(
        torch.autograd.grad(total, [hidden, head.weight]), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tokens", [1, 5, 22])
def test_the_head_never_sees_more_tokens_than_the_budget_allows(tokens) -> None:
    hidden, head, labels, weights = inputs()
    seen: list[int] = []
    head.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    weighted_nll(hidden, head, VOCABULARY, Scored(labels, weights, budget_for(tokens)))
    assert max(seen) <= tokens and sum(seen) == NUM
    assert len(seen) == -(-NUM // tokens)
    seen.clear()
    with torch.no_grad():
        weighted_nll(hidden, head, VOCABULARY, Scored(labels, weights, budget_for(tokens)))
    assert max(seen) <= tokens and sum(seen) == NUM


def test_logits_are_returned_when_asked_for() -> None:
    hidden, head, labels, weights = inputs()
    scored = Scored(labels, weights, budget_for(5), keep_logits=True)
    _, _, logits = weighted_nll(hidden, head, VOCABULARY, scored)
    assert logits is not None and not logits.requires_grad
    torch.testing.assert_close(logits, head(hidden).detach())


def test_nothing_to_score_costs_nothing() -> None:
    hidden, head, labels, weights = inputs(0)
    total, losses, _ = weighted_nll(hidden, head, VOCABULARY, Scored(labels, weights, 1))
    total.backward()
    assert total == 0 and losses.shape == (0,)
    assert hidden.grad is not None and head.weight.grad is not None
    assert not head.weight.grad.any()


def test_a_lora_on_the_head_learns_and_its_base_does_not() -> None:
    from peft import LoraConfig, get_peft_model

    hidden, head, labels, weights = inputs()
    model = get_peft_model(
        nn.Sequential(head), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    nll = F.cross_entropy(model(hidden), labels, reduction="none")
    expected = torch.autograd.grad((nll * weights).sum(), [hidden, *trained])
    scored = Scored(labels, weights, budget_for(4))
    total, _, _ = weighted_nll(hidden, model, VOCABULARY, scored)
    total.backward()
    for leaf, grad in zip([hidden, *trained], expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gradients_survive_tiny_weights(dtype) -> None:
    # 1e-7 is below what float16 can hold next to a softmax's smaller terms.
    hidden, head, labels, weights = inputs(scale=1e-7)
    nll = F.cross_entropy(head(hidden), labels, reduction="none")
    expected = torch.autograd.grad(2.0**24 * (nll * weights).sum(), [hidden, head.weight])
    with torch.autocast("cpu", dtype):
        scored = Scored(labels, weights, budget_for(7))
        total, losses, _ = weighted_nll(hidden, head, VOCABULARY, scored)
    assert losses.dtype == torch.float32
    grads = torch.autograd.grad(2.0**24 * total, [hidden, head.weight])
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.dtype == torch.float32
        assert ((ours - theirs).norm() / theirs.norm()) < 0.02


def test_gradients_of_micro_batches_add_up() -> None:
    hidden, head, labels, weights = inputs()
    for _ in range(2):
        scored = Scored(labels, weights, budget_for(6))
        weighted_nll(hidden, head, VOCABULARY, scored)[0].backward()
    nll = F.cross_entropy(head(hidden), labels, reduction="none")
    (expected,) = torch.autograd.grad(2 * (nll * weights).sum(), [head.weight])
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_second_backward_pass_is_refused() -> None:
    hidden, head, labels, weights = inputs()
    total, _, _ = weighted_nll(hidden, head, VOCABULARY, Scored(labels, weights, 1))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_inf_and_nan_come_through() -> None:
    hidden, head, labels, weights = inputs()
    with torch.no_grad():
        hidden[4, 0] = torch.nan
    total, losses, _ = weighted_nll(hidden, head, VOCABULARY, Scored(labels, weights, 800))
    assert total.isnan() and losses.isnan().sum() == 1
    total.backward()
    assert hidden.grad is not None and hidden.grad[4].isnan().any()
    assert hidden.grad[:4].isfinite().all()


def test_any_loss_of_single_tokens_can_be_chunked() -> None:
    hidden, head, _, weights = inputs(trains_head=False)

    def squares(part: torch.Tensor, span: slice) -> torch.Tensor:
        return head(part).square().mean(dim=-1)

    total, _ = weighted_sum(squares, hidden, weights, VOCABULARY, budget_for(3))
    (grad,) = torch.autograd.grad(total, hidden)
    whole = (squares(hidden, slice(0, NUM)) * weights).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(whole, hidden)[0])
