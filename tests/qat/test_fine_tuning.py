import copy

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from fakequant.errors import InvalidValueError
from fakequant.qat import FineTuning


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates])


def rates(optimizer, scheduler, steps: int) -> list[list[float]]:
    """The learning rate of each group, before each step and after the last."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [*seen, [group["lr"] for group in optimizer.param_groups]]


def test_it_is_a_hundredth_of_the_rate_for_a_tenth_of_the_steps():
    found = FineTuning.after_training(lr=0.2, steps=1000)
    assert (found.lr, found.steps) == (pytest.approx(0.002), 100)


def test_both_fractions_can_be_chosen():
    found = FineTuning.after_training(lr=0.2, steps=1000, lr_fraction=0.5, step_fraction=0.25)
    assert (found.lr, found.steps) == (0.1, 250)


def test_a_short_training_is_followed_by_one_step():
    assert FineTuning.after_training(lr=0.1, steps=3).steps == 1


def test_the_rate_is_torchs_cosine_annealing():
    ours, torchs = optimizer(0.3), optimizer(0.3)
    found = rates(ours, FineTuning(0.3, 20).scheduler(ours), 20)
    expected = rates(torchs, CosineAnnealingLR(torchs, T_max=20, eta_min=0.003), 20)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_every_group_comes_down_to_a_hundredth_of_its_own():
    ours = optimizer(0.3, 0.001)
    assert rates(ours, FineTuning(0.3, 7).scheduler(ours), 7)[-1] == pytest.approx([0.003, 0.00001])


def test_the_rate_stays_after_the_last_step():
    ours = optimizer(0.3)
    assert rates(ours, FineTuning(0.3, 4).scheduler(ours), 9)[4:] == [[pytest.approx(0.003)]] * 6


def test_a_resumed_schedule_goes_on_exactly():
    straight = optimizer(0.3)
    scheduler = FineTuning(0.3, 10).scheduler(straight)
    rates(straight, scheduler, 4)
    states = copy.deepcopy((straight.state_dict(), scheduler.state_dict()))
    resumed = optimizer(0.3)
    again = FineTuning(0.3, 10).scheduler(resumed)
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert rates(resumed, again, 6) == rates(straight, scheduler, 6)


@pytest.mark.parametrize("lr", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bad_rate_is_refused(lr):
    with pytest.raises(InvalidValueError, match="lr: expected a (finite )?number above 0"):
        FineTuning(lr, 10)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_bad_number_of_steps_is_refused(steps):
    with pytest.raises(InvalidValueError, match="steps: expected at least 1"):
        FineTuning(0.1, steps)
