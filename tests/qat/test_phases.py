import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fakequant
from fakequant import QuantDescriptor, Rule, preset
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn.walk import named_quantizers
from fakequant.qat import (
    FineTuning,
    Phases,
    follow_ranges,
    freeze_batchnorm,
    freeze_ranges,
    lower_bits,
    parameter_groups,
    reestimate_weights,
)

STEPS = 14


def data() -> Tensor:
    return torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def recalibrate(model: nn.Module) -> None:
    """As with the batches of a loader, which draws the seed of its workers."""
    loader = torch.utils.data.DataLoader(data(), batch_size=4)
    fakequant.calibrate(model, loader, "mse", weight_method="mse", progress=False)


fewer_bits = functools.partial(lower_bits, num_bits=5)

CHANGES = {
    0: functools.partial(follow_ranges, momentum=0.3),
    range(1, 6, 2): reestimate_weights,
    6: [fewer_bits, recalibrate],
    8: freeze_batchnorm,
    9: freeze_ranges,
    11: [functools.partial(lower_bits, num_bits={"*": 3, "5.*": 8}), recalibrate],
}


class Training:
    """A small training that can be saved and resumed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        conv, last = nn.Conv2d(1, 4, 3), nn.Linear(64, 2)
        self.model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), last)
        learned = QuantDescriptor(8, axis=0, learn_amax="lsq")
        fakequant.quantize(self.model, preset("int8") + Rule("5", weight=learned))
        self.optimizer = torch.optim.SGD(parameter_groups(self.model, 0.1), momentum=0.9)
        self.scheduler = FineTuning(0.1, STEPS).scheduler(self.optimizer)
        self.phases = Phases(self.model, CHANGES)

    @property
    def parts(self) -> dict:
        """What a checkpoint holds, in the order in which it is loaded."""
        names = ("model", "optimizer", "scheduler", "phases")
        return {name: getattr(self, name) for name in names}

    def run(self, steps: int) -> list[float]:
        """Return the losses, with labels that come from torch's generator."""
        losses = []
        for _ in range(steps):
            self.phases.step()
            loss = F.cross_entropy(self.model(data()), torch.randint(2, (8,)))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def save(self) -> dict:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return copy.deepcopy(states | {"generator": torch.get_rng_state()})

    def load(self, saved: dict, order: list[str]) -> None:
        for name in order:
            if name == "generator":
                torch.set_rng_state(saved[name])
            else:
                self.parts[name].load_state_dict(copy.deepcopy(saved[name]))


def grids(model: nn.Module) -> list[tuple]:
    return [(q.num_bits, q.momentum, q.grids) for _, q in named_quantizers(model)]


ORDER = ["model", "optimizer", "scheduler", "phases", "generator"]


@pytest.mark.parametrize("order", [ORDER, ORDER[::-1]], ids=["model first", "model last"])
@pytest.mark.parametrize("saved_at", [1, 4, 7, 9, 10, 12])
def test_a_resumed_training_goes_on_bit_for_bit(saved_at, order):
    straight = Training()
    straight.run(saved_at)
    saved = straight.save()
    expected = straight.run(STEPS - saved_at)
    resumed = Training()
    resumed.load(saved, order)
    assert resumed.run(STEPS - saved_at) == expected
    found, wanted = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert grids(resumed.model) == grids(straight.model)


def test_the_training_has_every_change():
    """Lest the test above compares trainings in which nothing happens."""
    training = Training()
    training.run(STEPS)
    assert [bits for bits, *_ in grids(training.model)] == [3, 3, 5, 5]
    assert not training.model.train()[1].training
    assert training.model[0].weight_quantizer.is_calibrated


def test_a_model_loaded_before_its_phases_computes_the_same():
    training = Training()
    training.run(12)
    again = Training()
    again.load(training.save(), ["model", "phases"])
    assert torch.equal(again.model.eval()(data()), training.model.eval()(data()))


def recorded(keys: list) -> tuple[list, dict]:
    """Return a list of (name of the change, its model) as they are called, and changes under these keys."""
    calls: list = []
    return calls, {key: functools.partial(lambda name, model: calls.append(name), str(key)) for key in keys}


def test_each_step_calls_its_own():
    calls, changes = recorded([0, 2, range(1, 7, 2), range(3, 5)])
    phases, seen = Phases(nn.Identity(), changes), []
    for _ in range(7):
        phases.step()
        seen.append(calls.copy())
        calls.clear()
    every, some = "range(1, 7, 2)", "range(3, 5)"
    assert seen == [["0"], [every], ["2"], [every, some], [some], [every], []]


def test_several_at_a_step_are_called_in_order_on_the_model():
    model, calls = nn.Identity(), []
    changes = [lambda m: calls.append(("first", m)), lambda m: calls.append(("second", m))]
    Phases(model, {0: changes}).step()
    assert calls == [("first", model), ("second", model)]


def test_nothing_is_called_before_the_first_step():
    calls, changes = recorded([0])
    Phases(nn.Identity(), changes)
    assert calls == []


def test_a_resume_calls_each_function_once_in_the_order_of_its_last_step():
    calls, changes = recorded([range(0, 9, 4), 2, range(0, 3), 5, 9])
    Phases(nn.Identity(), changes).load_state_dict({"steps": 6})
    assert calls == ["2", "range(0, 3)", "range(0, 9, 4)", "5"]


def test_a_resume_calls_nothing_that_was_called():
    calls, changes = recorded([0, 2, 4])
    phases = Phases(nn.Identity(), changes)
    for _ in range(3):
        phases.step()
    calls.clear()
    phases.load_state_dict({"steps": 5})
    assert calls == ["4"]


def test_a_function_that_fails_in_a_resume_leaves_ranges_as_they_were():
    def fail(model):
        model.input_quantizer.amax = 5.0
        raise RuntimeError("fails")

    model = fakequant.nn.QuantLinear(2, 2)
    model.input_quantizer.amax = 1.0
    phases = Phases(model, {0: fail})
    with pytest.raises(RuntimeError, match="fails"):
        phases.load_state_dict({"steps": 1})
    assert model.input_quantizer.amax == 1.0
    assert phases.state_dict() == {"steps": 0}


def test_going_back_is_refused():
    phases = Phases(nn.Identity(), {})
    for _ in range(3):
        phases.step()
    with pytest.raises(InvalidValueError, match="steps: expected at least 3, which began already, got 2"):
        phases.load_state_dict({"steps": 2})


def test_another_state_is_refused():
    with pytest.raises(InvalidValueError, match=r"state: expected what Phases.state_dict returned, got \['epoch'\]"):
        Phases(nn.Identity(), {}).load_state_dict({"epoch": 2})


def test_a_call_in_place_of_a_function_is_refused():
    with pytest.raises(InvalidTypeError, match=r"changes\[3\]: expected functions of the model, got what one returned"):
        Phases(nn.Identity(), {3: nn.Linear(2, 2)})


@pytest.mark.parametrize("key", ["0", 1.0, True, None])
def test_a_key_that_is_no_step_is_refused(key):
    with pytest.raises(InvalidTypeError, match="changes: expected a step or a range of steps as key"):
        Phases(nn.Identity(), {key: freeze_ranges})


@pytest.mark.parametrize("key", [-1, range(-2, 3), range(5, 5), range(5, 0, -1)])
def test_steps_that_never_come_are_refused(key):
    with pytest.raises(InvalidValueError, match="changes: expected steps from 0 on, in ascending order"):
        Phases(nn.Identity(), {key: freeze_ranges})


@pytest.mark.parametrize("change", [None, "freeze_ranges", [freeze_ranges, 3]])
def test_what_cannot_be_called_is_refused(change):
    with pytest.raises(InvalidTypeError, match=r"changes\[7\]: expected functions of the model"):
        Phases(nn.Identity(), {7: change})


def test_each_phase_compiles_once_without_a_graph_break():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    fakequant.quantize(model)
    fakequant.calibrate(model, [torch.randn(4, 2)], progress=False)
    every_step = {range(10): reestimate_weights}
    phases = Phases(model, every_step | {0: follow_ranges, 3: freeze_ranges, 5: freeze_batchnorm, 7: fewer_bits})
    compiled_at = []

    def backend(graph, _):
        compiled_at.append(phases.state_dict()["steps"] - 1)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(10):
        phases.step()
        compiled(torch.randn(4, 2)).sum().backward()
    assert compiled_at == [0, 3, 5, 7]
