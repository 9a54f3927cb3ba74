"""Does the file do what the torch model promised? Answered in steps of the scale, not by cosine.

Two kinds of run, each without and with graph optimizations: the whole file end to end
(SQNR, largest error, top-1 agreement), and the file cut at every activation quantizer
(see cut_graph), fed with the torch model's codes (steps between what both compute).
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from fakequant.errors import ValidationError
from fakequant.export.cut_graph import cut_at_quantizers
from fakequant.export.difference import Difference
from fakequant.export.engine_layers import EngineLayer
from fakequant.export.graph import is_dequantized
from fakequant.export.kernels import INTEGER_FORMS, WEIGHTED
from fakequant.export.load import load_model
from fakequant.export.open_session import open_session
from fakequant.export.runtime import Fallback, Session
from fakequant.export.torch_run import TorchSide, check_shapes


class Comparison:
    """How far ONNX Runtime is from torch, over all batches.

    Attributes:
        worst_quantizer: where a code is furthest off, given equal inputs; empty if none could be aligned.
    """

    def __init__(self) -> None:
        self.worst_quantizer = ""
        self._outputs = Difference()
        self._codes = Difference()
        self._samples = 0
        self._agreeing = 0

    @property
    def max_error(self) -> float:
        """Largest absolute difference of an output."""
        return self._outputs.largest

    @property
    def sqnr_db(self) -> float:
        """End to end, signal to difference of all outputs together in dB; inf if they are equal."""
        return self._outputs.sqnr_db

    @property
    def top1_agreement(self) -> float | None:
        """Share of samples with the same largest element along axis 1; None for one dimension or one class."""
        return self._agreeing / self._samples if self._samples else None

    @property
    def max_steps(self) -> int | None:
        """Largest difference of a code at any activation quantizer, given equal inputs; None if none was aligned."""
        return int(self._codes.largest) if self.worst_quantizer else None

    @property
    def moved(self) -> float:
        """Share of codes that differ at all."""
        return self._codes.share

    def add_outputs(self, expected: Sequence[NDArray[Any]], got: Sequence[NDArray[Any]]) -> None:
        """Take in the outputs of one batch."""
        for index, (reference, array) in enumerate(zip(expected, got, strict=True)):
            self._outputs.add(reference, array)
            if index == 0 and reference.ndim > 1 and reference.shape[1] > 1:
                agree = reference.argmax(1) == array.argmax(1)
                self._samples += agree.size
                self._agreeing += int(agree.sum())

    def add_codes(self, quantizer: str, expected: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in the codes of one quantizer's call, in steps from 0."""
        before = self._codes.largest
        self._codes.add(expected, got)
        if not self.worst_quantizer or self._codes.largest > before:
            self.worst_quantizer = quantizer

    def __str__(self) -> str:
        """Return one line."""
        words = [f"SQNR {self.sqnr_db:.1f} dB", f"largest error {self.max_error:.3g}"]
        if self.top1_agreement is not None:
            words.append(f"top-1 agreement {self.top1_agreement:.2%}")
        if self.max_steps is not None:
            words.append(f"{self.max_steps} steps at most at a quantizer given equal inputs ({self.moved:.4%} moved)")
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class ValidationReport:
    """Torch against ONNX Runtime, for one file.

    Args:
        path: the file.
        provider: where it ran.
        num_batches: how much data.
        simulated: without graph optimizations: Q and DQ as written; for ``"tensorrt"`` on the CPU.
        optimized: with them: integer kernels where there are any. For ``"tensorrt"`` end to end only:
            a file cut at its quantizers is no network that it would build.
        quantized_ops: convolutions, Gemms and MatMuls with Q/DQ on the weight or second operand, or of integers.
        integer_ops: how many of them ran as integer kernels in the optimized graph; None if the provider
            does not say.
        fallbacks: what ran on the CPU in place of the provider.
        layers: of TensorRT's engine, with precision and time; of the ``tensorrt`` package only.
        notes: why the file cannot be nearer to torch than it is.
    """

    path: Path
    provider: str
    num_batches: int
    simulated: Comparison
    optimized: Comparison
    quantized_ops: int
    integer_ops: int | None
    fallbacks: tuple[Fallback, ...] = ()
    layers: tuple[EngineLayer, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a line for each comparison, one on kernels, what fell back to the CPU, and notes; then the layers."""
        known = "an unknown number" if self.integer_ops is None else self.integer_ops
        lines = [
            f"{self.path} on {self.provider}, {self.num_batches} batches, against torch:",
            f"  optimizations off: {self.simulated}",
            f"  optimizations on:  {self.optimized}",
            f"  {known} of {self.quantized_ops} quantized ops ran as integer kernels",
        ]
        if self.fallbacks:
            lines.append(f"  {len(self.fallbacks)} nodes fell back to CPU: {', '.join(map(str, self.fallbacks))}")
        return "\n".join([*lines, *(f"  {line}" for line in (*self.notes, *self.layers))])


def validate_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    data: Iterable[Any],
    *,
    provider: str = "cpu",
    num_batches: int | None = None,
    inputs: Callable[[Any], tuple[Any, ...]] | None = None,
) -> ValidationReport:
    """Run a file in ONNX Runtime and compare it with the torch model it came from.

    Args:
        path: of the file.
        model: the quantized model; runs in eval mode and is left as it was.
        data: batches, as for ``calibrate``; their sizes must fit the file.
        provider: as for ``open_session``.
        num_batches: how many to use at most; None for all.
        inputs: returns the positional arguments of the model for a batch of another kind.

    Raises:
        ValidationError: the provider is missing (says what to install), the file is not valid, reaches outside of
            its folder or cannot be run, its quantizers or outputs are not the model's, or there is no data.
        InvalidTypeError: a batch of another kind without ``inputs``.
    """
    file = Path(path)
    exported = load_model(file)
    quantized_ops = sum(_is_quantized(node) for node in exported.graph.all_nodes())
    runs = {optimized: open_session(file, provider=provider, optimized=optimized) for optimized in (False, True)}
    comparisons = {False: Comparison(), True: Comparison()}
    done = 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fakequant-")))
        cuts = cut_at_quantizers(exported)
        side = TorchSide(file, exported, cuts, inputs)
        cut_runs = _cut_sessions(exported, folder / "cut.onnx", provider) if cuts else {}
        stack.enter_context(side.as_exported(model))
        for batch in data:
            if num_batches is not None and done >= num_batches:
                break
            expected = side.run(model, batch)
            for optimized, session in runs.items():
                got = list(session.run(expected.feeds).values())
                check_shapes(file, expected.outputs, got)
                comparisons[optimized].add_outputs(expected.outputs, got)
            for optimized, session in cut_runs.items():
                computed = session.run({**expected.feeds, **expected.codes})
                for cut in cuts:
                    steps = cut.in_steps(expected.codes, cut.given), cut.in_steps(computed, cut.computed)
                    check_shapes(f"{file}: {cut.name}", [steps[0]], [steps[1]])
                    comparisons[optimized].add_codes(cut.quantizer, *steps)
            done += 1
    if not done:
        raise ValidationError("data: expected at least one batch, got none")
    ran = runs[True]
    return ValidationReport(
        file,
        provider,
        done,
        comparisons[False],
        comparisons[True],
        quantized_ops,
        ran.integer_ops,
        ran.fallbacks,
        ran.layers,
        tuple(_notes(exported.graph)),
    )


def _notes(graph: ir.Graph) -> Iterator[str]:
    if any(node.op_type == "DynamicQuantizeLSTM" for node in graph.all_nodes()):
        yield (
            "DynamicQuantizeLSTM splits a batch between the threads of a session, each share with ranges of its own: "
            "Session(path, num_threads=1) is nearest to torch"
        )


def _is_quantized(node: ir.Node) -> bool:
    if node.op_type in INTEGER_FORMS:
        return True
    return node.op_type in WEIGHTED and is_dequantized(node.inputs[1])


def _cut_sessions(cut: ir.Model, path: Path, provider: str) -> dict[bool, Session]:
    ir.save(cut, path, external_data="cut.onnx.data")
    if provider == "tensorrt":
        return {False: Session(path, optimized=False)}
    return {optimized: Session(path, provider=provider, optimized=optimized) for optimized in (False, True)}
