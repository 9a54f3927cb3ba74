import io

import pytest
import torch
from torch import nn

import fakequant
from fakequant.nn import QuantConv2d, QuantLinear
from fakequant.summary import print_quant_summary, quant_summary


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(QuantConv2d(2, 3, 1), nn.Flatten(), QuantLinear(3, 4))


def test_a_line_a_quantizer_in_order_and_a_total(model):
    names = [line.split()[0] for line in quant_summary(model).splitlines()]
    assert names == ["0._input_quantizer", "0._weight_quantizer", "2._input_quantizer", "2._weight_quantizer", "4"]


def test_columns_are_aligned(model):
    positions = {line.index("8bit") for line in quant_summary(model).splitlines()[:-1]}
    assert positions == {len("0._weight_quantizer") + 2}


def test_state_is_the_quantizers_own(model):
    model[0].input_quantizer.amax = 2.0
    assert quant_summary(model).splitlines()[0].endswith(model[0].input_quantizer.extra_repr())


def test_total(model):
    fakequant.calibrate(model, [torch.randn(2, 2, 1, 1)], progress=False)
    model[0].input_quantizer.disable()
    model[2].input_quantizer.amax = None
    assert quant_summary(model).splitlines()[-1] == "4 quantizers, 3 enabled, 3 calibrated"


def test_model_without_quantizers():
    assert quant_summary(nn.Linear(2, 2)) == "0 quantizers, 0 enabled, 0 calibrated"


def test_module_under_two_names_is_listed_once():
    layer = QuantLinear(2, 2)
    assert len(quant_summary(nn.Sequential(layer, layer)).splitlines()) == 3


def test_print_goes_to_standard_output(model, capsys):
    print_quant_summary(model)
    assert capsys.readouterr().out == quant_summary(model) + "\n"


def test_print_to_a_file(model, capsys):
    file = io.StringIO()
    print_quant_summary(model, file)
    assert (file.getvalue(), capsys.readouterr().out) == (quant_summary(model) + "\n", "")
