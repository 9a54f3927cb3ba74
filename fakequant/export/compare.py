"""compare: which layer of a file is the first that does not compute what the torch model does?

The file runs twice on one batch, with the codes of every activation quantizer as outputs:
as it is, and cut at these quantizers, each stretch from the codes that torch has there.
The second run tells errors that a layer makes from those that it was given.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor, nn

from fakequant.arguments import check_module
from fakequant.errors import InvalidValueError, ValidationError
from fakequant.export.compare_report import ComparedLayer, CompareReport
from fakequant.export.cut_graph import QUANTIZES, Cut, cut_at_quantizers, expose_codes, quantizer_names
from fakequant.export.difference import Difference
from fakequant.export.graph import QUANTIZER_KEY, constant_of
from fakequant.export.load import load_model
from fakequant.export.runtime import Session
from fakequant.export.stretches import Stretches
from fakequant.export.torch_run import TorchRun, TorchSide, check_shapes
from fakequant.nn.walk import named_quantizers

_Arrays = Mapping[str, NDArray[Any]]


def compare(
    model: nn.Module,
    path: str | os.PathLike[str],
    batch: Any,
    *,
    tolerance: int = 1,
    optimized: bool = False,
    provider: str = "cpu",
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
) -> CompareReport:
    """Run one batch in torch and in ONNX Runtime, and compare them layer by layer.

    The layers are the activation quantizers of the file, and its outputs. The model runs in eval mode, for
    the target that the file was made for, and is left as it was.

    Args:
        model: the quantized model that was exported.
        path: of the file.
        batch: as for ``calibrate``; its size must fit the file.
        tolerance: how many steps a code may be off, given equal inputs. A right file needs 1, and 2 if
            ``optimized``. Outputs have no grid; they may have 50 dB.
        optimized: with graph optimizations: integer kernels where there are any.
        provider: as for ``Session``.
        inputs: returns the positional arguments of the model for a batch of another kind.

    Raises:
        ValidationError: the file is not valid, reaches outside of its folder or cannot be run, the provider is
            missing, or the quantizers or outputs of the file are not the model's; names the file and these.
        InvalidTypeError: model is no module, or a batch of another kind without ``inputs``.
        InvalidValueError: unknown provider, or a negative tolerance.
    """
    check_module(model)
    if tolerance < 0:
        raise InvalidValueError(f"tolerance: expected a number of steps from 0 on, got {tolerance}")
    file = Path(path)
    exported = load_model(file)
    outputs = [str(value.name) for value in exported.graph.outputs]
    cuts = expose_codes(exported)
    side = TorchSide(file, exported, cuts, inputs)
    with side.as_exported(model):
        expected = side.run(model, batch)
        scales = {name: quantizer.scale for name, quantizer in named_quantizers(model)}
    notes = tuple(_notes(exported.graph, cuts, expected.called))
    with tempfile.TemporaryDirectory(prefix="fakequant-") as folder:
        whole, cut = Path(folder) / "whole.onnx", Path(folder) / "cut.onnx"
        ir.save(exported, whole, external_data="whole.onnx.data")
        del exported  # Its weights are in the folder now, once for both graphs.
        accumulated = _run(whole, file, expected.feeds, provider, optimized)
        graph = ir.load(whole)
        cut_at_quantizers(graph)
        ir.save(graph, cut)
        equal = _run(cut, file, {**expected.feeds, **expected.codes}, provider, optimized)
    layers = _layers(file, Stretches(graph.graph), cuts, outputs, expected, (equal, accumulated), scales)
    return CompareReport(file, provider, optimized, tolerance, tuple(layers), notes)


def _run(path: Path, file: Path, feeds: _Arrays, provider: str, optimized: bool) -> _Arrays:
    try:
        return Session(path, provider=provider, optimized=optimized).run(feeds)
    except ValidationError as error:
        # The user knows the file, not the copy of it that ran.
        raise ValidationError(str(error).replace(str(path), str(file))) from error


def _layers(
    file: Path,
    stretches: Stretches,
    cuts: Sequence[Cut],
    outputs: Sequence[str],
    expected: TorchRun,
    runs: tuple[_Arrays, _Arrays],
    scales: Mapping[str, Tensor | None],
) -> Iterator[ComparedLayer]:
    """Yield the layers; runs are the one given equal inputs and the accumulated one."""
    check_shapes(file, expected.outputs, [runs[0][name] for name in outputs])
    names = {name: cut.name for cut in cuts for name in (*cut.given, *cut.computed)}
    ends: list[tuple[str, Cut | None, NDArray[Any]]]
    ends = [(cut.computed[0], cut, cut.in_steps(expected.codes, cut.given)) for cut in cuts]
    ends += ((name, None, array) for name, array in zip(outputs, expected.outputs, strict=True))
    for end, cut, reference in ends:
        where = f"{file}: {names.get(end, end)}"
        got = (cut.in_steps(run, cut.computed) if cut else run[end] for run in runs)
        equal, accumulated = (_difference(where, reference, array) for array in got)
        stretch = stretches.to(end)
        scale = scales[cut.quantizer] if cut else None
        yield ComparedLayer(
            name=cut.name if cut else end,
            quantizers=cut.quantizers if cut else (),
            modules=stretch.modules,
            sources=tuple(dict.fromkeys(names.get(source, source) for source in stretch.sources)),
            scale=cut.scale if cut else None,
            torch_scale=None if scale is None or scale.numel() != 1 else float(scale),
            steps=int(equal.largest) if cut else None,
            moved=equal.share if cut else None,
            sqnr_db=equal.sqnr_db,
            accumulated_steps=int(accumulated.largest) if cut else None,
            accumulated_sqnr_db=accumulated.sqnr_db,
        )


def _difference(where: str, expected: NDArray[Any], got: NDArray[Any]) -> Difference:
    check_shapes(where, [expected], [got])
    found = Difference()
    found.add(expected, got)
    return found


def _notes(graph: ir.Graph, cuts: Sequence[Cut], called: Sequence[str]) -> Iterator[str]:
    """Say what is not compared."""
    aligned = {cut.computed[0] for cut in cuts}
    activations = [
        node for node in graph.all_nodes() if node.op_type in QUANTIZES and constant_of(node.inputs[0]) is None
    ]
    others = [node for node in activations if node.outputs[0].name not in aligned]
    unnamed = [node for node in others if not quantizer_names(node)]
    integer_lstms = sum(node.op_type == "DynamicQuantizeLSTM" for node in graph.all_nodes())
    if integer_lstms:
        yield f"Not compared: the codes inside of {integer_lstms} DynamicQuantizeLSTM."
    elif not activations:
        yield "Only the outputs are compared: the file quantizes no activation."
    if unnamed:
        yield (
            f"Not compared: {len(unnamed)} of {len(activations)} QuantizeLinear do not name their quantizer "
            f"in the metadata {QUANTIZER_KEY!r}; export_onnx writes it."
        )
    if other_grids := [name for node in others for name in quantizer_names(node)]:
        yield f"Not compared, as their grid is not one of integers with one known scale: {', '.join(other_grids)}."
    in_file = {name for node in graph.all_nodes() for name in quantizer_names(node)}
    if in_file and (absent := [name for name in called if name not in in_file]):
        yield f"In the model, but not in the file: {', '.join(absent)}."
