import math

import pytest
import torch
from safetensors.torch import load_file

from memdlm.diffusion.schedule import SCHEDULES, get_schedule
from memdlm.errors import ConfigError


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_equals_the_published_numbers(name, fixtures):
    grid = load_file(fixtures / "schedule" / "alpha.safetensors")
    schedule, t = get_schedule(name), grid["t"]
    torch.testing.assert_close(schedule.alpha(t), grid[f"{name}.alpha"], rtol=0, atol=1e-7)
    torch.testing.assert_close(
        schedule.alpha_derivative(t), grid[f"{name}.alpha_derivative"], rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(schedule.weight(t), grid[f"{name}.weight"], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        schedule.reverse_mask_probability(grid["pairs_s"], grid["pairs_t"]),
        grid[f"{name}.reverse_mask_prob"],
        rtol=1e-6,
        atol=1e-7,
    )


def test_linear_weight_is_one_over_t_and_cosine_as_worked_by_hand():
    half = torch.tensor([0.5])
    assert get_schedule("linear").weight(half).item() == pytest.approx(2.0, rel=1e-5)
    # 1 - alpha = cos(pi/4), -alpha' = pi/2 sin(pi/4): the weight is pi/2 tan(pi/4)
    assert get_schedule("cosine").weight(half).item() == pytest.approx(math.pi / 2, rel=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivative_is_the_slope_of_alpha(name):
    schedule = get_schedule(name)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(slope, schedule.alpha_derivative(t).detach())


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'sigmoid'.*linear, cosine"):
        get_schedule("sigmoid")
