"""What processes compare, and what they make of each other's reports."""

import pytest
import torch
from torch import nn

from fakequant.calibration import calibrate
from fakequant.descriptor import QuantDescriptor
from fakequant.distributed import Processes
from fakequant.distributed.description import description, digest, raise_difference
from fakequant.distributed.together import combined
from fakequant.errors import CalibrationError, InvalidTypeError, InvalidValueError
from fakequant.nn import QuantLinear
from fakequant.nn.walk import named_quantizers


def described(model: nn.Module, **options: object) -> dict[str, str]:
    return description(model, dict(named_quantizers(model)), options)


def linear(**weight: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(QuantLinear(3, 2, quant_desc_weight=QuantDescriptor(8, **weight)), nn.BatchNorm1d(2))


def changed(change) -> nn.Module:
    model = linear()
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (linear(axis=0), "0._weight_quantizer"),
        (linear().half(), "0.weight"),
        (changed(lambda m: m[0].bias.add_(1e-6)), "0.bias"),
        (changed(lambda m: m[1].weight.neg_()), "1.weight"),
    ],
    ids=["grid", "dtype", "values", "sign"],
)
def test_another_model_is_described_in_other_words(other, name):
    own, words = described(linear()), described(other)
    assert own[name] != words[name]
    assert digest(own) != digest(words)


@pytest.mark.parametrize(
    "change",
    [lambda m: m[1].running_mean.add_(1), lambda m: setattr(m[0].weight_quantizer, "amax", 3.0)],
    ids=["buffers", "learned ranges"],
)
def test_what_calibration_does_not_need_may_differ(change):
    own, other = linear(learn_amax="lsq"), linear(learn_amax="lsq")
    change(other)
    assert digest(described(other)) == digest(described(own))


def test_options_are_described():
    assert digest(described(linear(), percentile=99.0)) != digest(described(linear(), percentile=99.9))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"a": "1"}, {"a": "2"}], "process 7: a: expected 1 as in process 4, got 2"),
        ([{"a": "1"}, {}], "process 7: a: expected 1 as in process 4, got nothing of that name"),
        ([{"a": "1", "b": "2"}, {"b": "2", "a": "1"}], "process 7: expected the layers in the order of process 4"),
        ([{}, {str(i): "x" for i in range(9)}], "process 7: and 4 more"),
    ],
    ids=["other", "missing", "order", "many"],
)
def test_the_difference_is_named(parts, message):
    with pytest.raises(CalibrationError, match=message):
        raise_difference((4, 7), parts)


def report(batches: int, called: list[bool], shapes: list[list[int] | None]) -> dict[str, object]:
    return {"batches": batches, "called": called, "shapes": shapes}


def test_a_quantizer_that_one_process_called_is_called():
    found, shapes = combined(
        (0, 1), ("a", "b"), [report(2, [True, False], [[1, 3], None]), report(3, [False] * 2, [None] * 2)]
    )
    assert found == (5, frozenset("a"))
    assert shapes == [(1, 3), None]


def test_all_problems_are_named():
    with pytest.raises(CalibrationError, match=r"process 4: data: .*\n.*process 7: data: .*\n  a: .*\(2,\).*\(3,\)"):
        combined((4, 7), ("a",), [report(0, [True], [[2]]), report(0, [True], [[3]])])


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf"), 1e30])
def test_the_time_limit_is_positive(limit):
    with pytest.raises(
        InvalidValueError, match=r"time_limit: expected a (finite )?number above 0 and at most 1e\+09, got"
    ):
        Processes(time_limit=limit)


@pytest.mark.parametrize(
    ("field", "value"),
    [*[("time_limit", value) for value in (None, "600", [1], True)], *[("group", value) for value in ("x", 1, [0, 1])]],
    ids=str,
)
def test_a_field_of_another_type_is_refused(field, value):
    with pytest.raises(InvalidTypeError, match=f"^{field}: expected "):
        Processes(**{field: value})


def test_without_torch_distributed_a_process_calibrates_alone():
    model = linear()
    assert calibrate(model, [torch.ones(1, 3)], progress=False, processes=Processes()).num_batches == 1
