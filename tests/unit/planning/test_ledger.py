import torch

from memdlm.planning.ledger import ACTIVATIONS, MemoryLedger

KIB = 2**10


def tensor(kibibytes: int) -> torch.Tensor:
    return torch.empty(kibibytes * KIB, dtype=torch.uint8)


def test_the_peak_is_the_largest_sum_and_not_the_last() -> None:
    ledger = MemoryLedger()
    weights, activation = tensor(1), tensor(4)
    ledger.label(weights, "weights")
    ledger.hold(activation)
    del activation
    later = tensor(2)
    ledger.hold(later)
    assert ledger.peak() == {"weights": KIB, ACTIVATIONS: 4 * KIB}


def test_views_share_one_entry() -> None:
    ledger = MemoryLedger()
    whole = tensor(4)
    assert ledger.hold(whole)
    view = whole[1:].view(-1)
    assert not ledger.hold(view)
    del whole
    other = tensor(1)
    ledger.hold(other)  # the view keeps all of it alive
    assert sum(ledger.peak().values()) == 5 * KIB


def test_a_label_given_late_counts_from_the_beginning() -> None:
    ledger = MemoryLedger()
    gradient = tensor(2)
    ledger.hold(gradient)
    assert ledger.label_of(gradient) is None
    ledger.label(gradient, "gradients")
    assert ledger.label_of(gradient) == "gradients"
    assert ledger.peak() == {"gradients": 2 * KIB}


def test_each_part_has_a_largest_size_of_its_own() -> None:
    ledger = MemoryLedger()
    first = tensor(3)
    ledger.label(first, "logits")
    del first
    second = tensor(4)
    ledger.label(second, "gradients")
    assert ledger.largest() == {"logits": 3 * KIB, "gradients": 4 * KIB}
    assert ledger.peak()["gradients"] == 4 * KIB
    assert ledger.peak()["logits"] == 0
