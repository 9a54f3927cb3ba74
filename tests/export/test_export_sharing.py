"""Which quantizers are in the file: shared tensors, shared modules, tied weights, disabled and unused ones."""

import pytest
import torch
from torch import Tensor, nn

import fakequant as fq

D = fq.QuantDescriptor


class Branches(nn.Module):
    """Two layers on one tensor; ``computed`` writes it twice."""

    def __init__(self, computed: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.computed = nn.Linear(4, 4), nn.Linear(4, 4), computed

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.relu()) + self.b(x.relu()) if self.computed else self.a(x) + self.b(x)


class Repeated(nn.Module):
    """One layer on x, on another tensor, and on x again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.a(3 * x.sigmoid()), self.a(x)], 1)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def input_quantizers(exported) -> list[str]:
    return [n.metadata_props["fakequant.quantizer"] for n in exported.nodes("QuantizeLinear")]


@pytest.mark.parametrize("recipe", [fq.Recipe() + fq.Rule(), fq.Recipe() + fq.Rule(input=D(4))], ids=["int8", "int4"])
def test_equal_ranges_share_one_q(export, recipe):
    exported = export(Branches(), torch.randn(3, 4), recipe=recipe)
    assert input_quantizers(exported) == ["a._input_quantizer\nb._input_quantizer"]
    assert len(exported.report.quantizers) == 4
    assert exported.report.not_in_file == ()
    assert exported.validate().simulated.max_steps == 0


def test_equal_computed_tensors_leave_no_quantizer_unaccounted(export):
    exported = export(Branches(computed=True), torch.randn(3, 4))
    assert len(exported.nodes("QuantizeLinear")) == 1
    assert len(exported.report.quantizers) == 4
    assert exported.report.not_in_file == ()


def test_different_ranges_keep_their_own_q(export):
    recipe = fq.preset("int8") + fq.Rule("b", input=D(amax=0.7))
    exported = export(Branches(), torch.randn(3, 4), recipe=recipe)
    assert input_quantizers(exported) == ["a._input_quantizer", "b._input_quantizer"]
    assert exported.validate().simulated.sqnr_db >= 110


def test_a_module_called_again_is_aligned_call_by_call(export):
    exported = export(Repeated(), torch.randn(3, 4))
    assert [n.metadata_props["fakequant.call"] for n in exported.nodes("QuantizeLinear")] == ["0", "1"]
    assert exported.report.integer_weights == 1
    assert exported.validate().simulated.max_steps == 0


@pytest.mark.parametrize("preset", ["int8", "w4a8"])
def test_a_tied_weight_is_stored_once(export, preset):
    exported = export(Tied(), torch.randn(3, 4), recipe=preset)
    assert exported.report.integer_weights == 1
    assert exported.report.not_in_file == ()
    assert exported.validate().simulated.sqnr_db >= 110


def test_disabled_quantizers_stay_out(export):
    recipe = fq.preset("int8") + fq.Rule("0", weight=None) + fq.Rule("2", input=None, weight=None)
    exported = export(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(3, 4), recipe=recipe)
    assert exported.report.quantizers == ("0._input_quantizer",)
    assert exported.report.float_ops == {
        "0 (Gemm)": "no Q/DQ on its weight or second input",
        "2 (Gemm)": "no Q/DQ on its data and its weight or second input",
    }


def test_two_float_ops_of_one_module_are_both_listed(export):
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x) @ x

    exported = export(nn.Sequential(nn.Linear(4, 4), Products()), torch.randn(4, 4))
    assert len(exported.report.float_ops) == 2


def test_a_quantizer_that_is_never_called_is_reported(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Model()
    fq.quantize(model, fq.Recipe() + fq.Rule(type="Linear", input=D(amax=1.0), weight=D(amax=1.0)))
    report = fq.export_onnx(model, (torch.randn(3, 4),), tmp_path / "m.onnx")
    assert report.not_in_file == ("unused._input_quantizer", "unused._weight_quantizer")
    assert "not in the file (no output depends on it): unused._input_quantizer" in str(report)


def test_names_with_spaces_survive(export):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"a b": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.heads["a b"](x)

    exported = export(Model(), torch.randn(3, 4))
    assert exported.report.quantizers == ("heads.a b._input_quantizer", "heads.a b._weight_quantizer")
    assert exported.validate().simulated.max_steps == 0


def test_the_root_module_may_be_the_layer(export):
    assert export(nn.Linear(4, 4), torch.randn(3, 4)).report.quantizers == ("_input_quantizer", "_weight_quantizer")


def test_a_model_without_quantizers_is_exported_as_it_is(tmp_path):
    report = fq.export_onnx(nn.Linear(4, 4), (torch.randn(3, 4),), tmp_path / "m.onnx")
    assert (report.quantizers, report.integer_weights) == ((), 0)
