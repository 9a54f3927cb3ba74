"""What is true of one quantized class: each cell of the table is the result of running it."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fakequant as fq
from examples import EXAMPLES, Inputs

YES = "yes"
TARGETS = ("tensorrt", "onnxruntime")
_DYNAMIC = fq.QuantDescriptor(8, dynamic=True)


class Alone(nn.Module):
    """A model that is one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> object:
        return self.layer(*inputs)


class Between(Alone):
    """The same with a quantized output, as where another quantized layer follows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.output = fq.TensorQuantizer()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.output(_first(super().forward(*inputs)))


def fast_cells(cls: type[nn.Module]) -> Iterator[str]:
    """Yield whether it is quantized by default, and statically, dynamically, in training."""
    model, _ = _made(cls)
    yield YES if fq.quantize(model).quantized else f'`type="{cls.__name__}"`'
    yield _cell(_static, cls)
    yield _cell(_dynamic, cls)
    yield _cell(_training, cls)


def file_cell(cls: type[nn.Module], target: str, folder: Path) -> str:
    """Return what runs the layer in the file for a target."""
    model, inputs = _calibrated(cls, Between)
    file = folder / f"{cls.__name__}.onnx"
    try:
        report = fq.export_onnx(model, inputs, file, target=target)
    except fq.errors.ExportError as error:
        return f"not exported: {_why_not(str(error))}"
    compared = fq.compare(model, file, inputs, inputs=lambda batch: batch)
    if compared.first_divergence is not None:
        return f"**fault**: {compared.first_divergence}"
    if target == "tensorrt":
        is_integer = bool(report.integer_weights) and not report.float_ops
        findings = sorted({finding.rule for finding in fq.check_onnx(file).findings})
    else:
        is_integer, findings = bool(fq.inspect_onnx(file).integer_ops), []
    what = "integer" if is_integer else "float, weights in 8 bits" if report.integer_weights else "float"
    return what + (f" ({', '.join(findings)})" if findings else "")


def _why_not(error: str) -> str:
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", error)
    return f"torch has no ONNX form of {missing[1]}" if missing else error.splitlines()[0][:120]


def _cell(check: object, cls: type[nn.Module]) -> str:
    try:
        return YES if check(cls) else "**fault**"
    except fq.errors.FakeQuantError as error:
        return f"no: {str(error).splitlines()[0][:80]}"


def _made(cls: type[nn.Module], model_class: type[Alone] = Alone) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    args, inputs = EXAMPLES[cls]
    return model_class(cls(*args)), inputs()


def _quantized(
    cls: type[nn.Module], grid: object = fq.Grid.DEFAULT, model_class: type[Alone] = Alone
) -> tuple[nn.Module, Inputs]:
    model, inputs = _made(cls, model_class)
    fq.quantize(model, fq.preset("int8") + fq.Rule(type=cls.__name__, input=grid, weight=grid))
    return model, inputs


def _calibrated(cls: type[nn.Module], model_class: type[Alone] = Alone) -> tuple[nn.Module, Inputs]:
    model, inputs = _quantized(cls, model_class=model_class)
    fq.calibrate(model, [inputs], forward=lambda model, batch: model(*batch), progress=False)
    return model.eval(), inputs


def _first(outputs: object) -> Tensor:
    return pytree.tree_leaves(outputs)[0]


def _differs(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a quantized model computes something else than the float one, finite and not far away."""
    quantized = _first(model.eval()(*inputs))
    exact = _first(fq.dequantize(model)(*inputs))
    difference = (quantized - exact).abs().max()
    return bool(0 < difference <= 0.1 * exact.abs().max())


def _static(cls: type[nn.Module]) -> bool:
    return _differs(*_calibrated(cls))


def _dynamic(cls: type[nn.Module]) -> bool:
    return _differs(*_quantized(cls, _DYNAMIC))


def _training(cls: type[nn.Module]) -> bool:
    """Whether one step of SGD has finite gradients and changes every parameter, or reaches the input of the layer."""
    model, inputs = _calibrated(cls)
    tensors = list(model.parameters()) or [x.requires_grad_() for x in inputs]
    before = [tensor.detach().clone() for tensor in tensors]
    outputs = _first(model.train()(*inputs))
    (outputs * torch.randn_like(outputs)).sum().backward()
    optimizer = torch.optim.SGD(tensors, lr=0.1)
    optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, tensors, strict=True)]
    return any(moved) and all(bool(tensor.isfinite().all()) for tensor in tensors)
