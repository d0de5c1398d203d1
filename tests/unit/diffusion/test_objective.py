import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from memdlm.diffusion.objective import ObjectiveConfig, coefficients, row_weights
from memdlm.diffusion.states import CleanBatch
from memdlm.diffusion.supervision import Supervision
from memdlm.errors import ConfigError, DataError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.losses import INNER_LOSSES, Prediction

PUBLISHED = {"schedule": "scheduler", "uniform": "uniform"}
WEIGHTINGS = ("schedule", "uniform")
NORMALISERS = ("token", "sequence", "batch")


@pytest.fixture(scope="module")
def published(fixtures):
    return load_file(fixtures / "schedule" / "losses.safetensors")


def clean_batch(published):
    padding = (published["input_ids"] == published["pad_token_id"]) & (published["labels"] != -100)
    return CleanBatch.from_labels(published["input_ids"], published["labels"], padding)


@pytest.mark.parametrize(
    ("schedule", "weighting", "normaliser", "padding"),
    list(
        itertools.product(("linear", "cosine"), WEIGHTINGS, NORMALISERS, ("pad_none", "pad_both"))
    ),
)
def test_outer_loss_equals_the_published_number(
    published, schedule, weighting, normaliser, padding
):
    batch = clean_batch(published)
    masked = published["masked"]
    if padding == "pad_both":
        batch = batch.without_padding()
        masked = masked & batch.maskable
    logits = published["logits"].requires_grad_()
    factors = coefficients(
        masked, batch.maskable, row_weights(published["t"], weighting, schedule), normaliser
    )
    supervision = Supervision.pack(masked, batch.clean, factors)
    at_positions = logits.gather(
        1, supervision.positions[..., None].expand(-1, -1, logits.shape[-1])
    )
    nll = F.cross_entropy(supervision.select(at_positions), supervision.labels, reduction="none")
    loss = (nll * supervision.coefficients).sum()
    name = f"{schedule}.{PUBLISHED[weighting]}.{normaliser}.{padding}"
    torch.testing.assert_close(loss, published[f"outer.{name}"], rtol=1e-5, atol=0)
    if f"outer_grad.{name}" in published:
        (grad,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(grad, published[f"outer_grad.{name}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "weighting", "normaliser"),
    list(
        itertools.product(
            (("cross_entropy", "inner_ce"), ("kl", "inner_kl"), ("reverse_kl", "inner_reverse")),
            WEIGHTINGS,
            NORMALISERS,
        )
    ),
)
def test_inner_loss_equals_the_published_number(published, loss, weighting, normaliser):
    ours, theirs = loss
    masked = published["masked"]
    # What the published inner loop calls "sequence" multiplies by the rows where it should divide.
    name = "reference_sequence" if normaliser == "sequence" else normaliser
    factors = coefficients(
        masked, masked, row_weights(published["inner_t"], weighting, "linear"), name
    )
    labels = published["input_ids"][masked]
    student, teacher = (
        Prediction(logits, logits, lambda at: at)
        for logits in (published["logits"][masked], published["teacher_logits"][masked])
    )
    tokens = INNER_LOSSES[ours].compute(student, teacher, labels, MemoryConfig(loss=ours))
    value = (tokens * factors[masked]).sum()
    expected = published[f"{theirs}.{PUBLISHED[weighting]}.{normaliser}"]
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


# Two rows: 1 of 2 and 2 of 3 maskable tokens are supervised; weights 2 and 4.
SUPERVISED = torch.tensor([[True, False, False, False], [True, True, False, False]])
MASKABLE = torch.tensor([[True, True, False, False], [True, True, True, False]])
WEIGHTS = torch.tensor([2.0, 4.0])


@pytest.mark.parametrize(
    ("normaliser", "first", "second"),
    [
        ("token", 2 / 5, 4 / 5),
        ("sequence", 2 / 2 / 2, 4 / 3 / 2),
        ("batch", 2 / 2, 4 / 2),
        ("reference_sequence", 2 / 2 * 2, 4 / 3 * 2),
    ],
)
def test_coefficients_by_hand(normaliser, first, second):
    expected = torch.tensor([[first, 0, 0, 0], [second, second, 0, 0]])
    actual = coefficients(SUPERVISED, MASKABLE, WEIGHTS, normaliser)
    torch.testing.assert_close(actual, expected)
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("normaliser", [*NORMALISERS, "reference_sequence"])
def test_independent_rows_have_the_coefficients_of_each_row_alone(normaliser):
    together = coefficients(SUPERVISED, MASKABLE, WEIGHTS, normaliser, rows_are_independent=True)
    for row in range(2):
        alone = coefficients(
            SUPERVISED[row, None], MASKABLE[row, None], WEIGHTS[row, None], normaliser
        )
        assert torch.equal(together[row, None], alone)


@pytest.mark.parametrize("normaliser", [*NORMALISERS, "reference_sequence"])
def test_nothing_supervised_gives_zero_and_not_nan(normaliser):
    nothing = torch.zeros_like(SUPERVISED)
    for independent in (False, True):
        factors = coefficients(
            nothing, nothing, WEIGHTS, normaliser, rows_are_independent=independent
        )
        assert torch.equal(factors, torch.zeros(2, 4))


def test_unknown_normaliser_names_the_known_ones():
    with pytest.raises(ConfigError, match="'rows' is not one of token, sequence, batch"):
        coefficients(SUPERVISED, MASKABLE, WEIGHTS, "rows")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "sigmoid"),
        ("weighting", "scheduler"),
        ("normaliser", "tokens"),
        ("padding", "none"),
        ("logits_budget", 0),
        ("logits_budget", 1.5),
        ("time_epsilon", 0.0),
        ("time_epsilon", 1.0),
        ("time_epsilon", float("nan")),
    ],
)
def test_a_bad_objective_setting_is_named(field, value):
    with pytest.raises(ConfigError, match=rf"objective\.{field}"):
        ObjectiveConfig(**{field: value})


def test_packing_keeps_order_labels_and_coefficients():
    supervised = torch.tensor(
        [[False, True, False, True], [False] * 4, [True, False, False, False]]
    )
    clean = torch.arange(12).view(3, 4)
    factors = supervised * torch.tensor([[1.0], [2.0], [3.0]])
    packed = Supervision.pack(supervised, clean, factors)
    assert packed.positions.tolist() == [[1, 3], [0, 0], [0, 0]]
    assert packed.valid.tolist() == [0, 1, 4]
    assert packed.rows.tolist() == [0, 0, 2]
    assert packed.labels.tolist() == [1, 3, 8]
    assert packed.coefficients.tolist() == [1.0, 1.0, 3.0]
    assert packed.select(clean.gather(1, packed.positions)).tolist() == [1, 3, 8]


def test_packing_nothing_leaves_one_unused_position():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    packed = Supervision.pack(nothing, torch.zeros(2, 3, dtype=torch.int64), nothing.float())
    assert packed.positions.shape == (2, 1)
    assert packed.valid.numel() == packed.labels.numel() == 0


def test_labels_of_another_shape_are_refused():
    with pytest.raises(DataError, match="differ in shape"):
        CleanBatch.from_labels(torch.zeros(2, 3), torch.zeros(2, 4))
