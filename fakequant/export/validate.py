"""Does the file do what the torch model promised? Answered in steps of the scale, not by cosine.

Two kinds of run, each without and with graph optimizations: the whole file end to end
(SQNR, largest error, top-1 agreement), and the file cut at every activation quantizer
(see cut_graph), fed with the torch model's codes (steps between what both compute).
"""

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fakequant.batches import model_arguments
from fakequant.errors import InvalidTypeError, ValidationError
from fakequant.export.cut_graph import Cut, cut_at_quantizers
from fakequant.export.graph import TARGET_KEY, produced_by
from fakequant.export.kernels import WEIGHTED
from fakequant.export.runtime import Session
from fakequant.nn import TensorQuantizer
from fakequant.nn.modes import evaluating
from fakequant.nn.walk import named_quantizers
from fakequant.retarget import targeted


@dataclasses.dataclass
class Comparison:
    """How far ONNX Runtime is from torch; sums over all batches.

    Attributes:
        max_error: largest absolute difference of an output.
        sqnr_db: end to end, signal to difference of all outputs together; inf if they are equal.
        top1_agreement: share of samples with the same largest element along axis 1; None for
            outputs of one dimension or one class.
        max_steps: largest difference of a code at any activation quantizer given equal inputs;
            None if the file has no quantizer that could be aligned.
        worst_quantizer: where that is.
        moved: share of codes that differ at all.
    """

    max_error: float = 0.0
    max_steps: int | None = None
    worst_quantizer: str = ""
    _signal: float = 0.0
    _noise: float = 0.0
    _samples: int = 0
    _agreeing: int = 0
    _codes: int = 0
    _moved: int = 0

    @property
    def sqnr_db(self) -> float:
        """Signal to difference in dB."""
        if self._noise == 0.0:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal else -math.inf

    @property
    def top1_agreement(self) -> float | None:
        """Share of samples with the same class."""
        return self._agreeing / self._samples if self._samples else None

    @property
    def moved(self) -> float:
        """Share of codes that differ."""
        return self._moved / self._codes if self._codes else 0.0

    def add_outputs(self, expected: Sequence[Tensor], got: Sequence[NDArray[Any]]) -> None:
        """Take in the outputs of one batch."""
        for index, (tensor, array) in enumerate(zip(expected, got, strict=True)):
            reference = tensor.detach().cpu().to(torch.float64).numpy()
            difference = array.astype(np.float64) - reference
            self.max_error = max(self.max_error, float(np.abs(difference).max(initial=0.0)))
            self._signal += float(np.square(reference).sum())
            self._noise += float(np.square(difference).sum())
            if index == 0 and reference.ndim > 1 and reference.shape[1] > 1:
                agree = reference.argmax(1) == array.argmax(1)
                self._samples += agree.size
                self._agreeing += int(agree.sum())

    def add_codes(self, quantizer: str, expected: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in the codes of one quantizer's call."""
        steps = np.abs(got.astype(np.int32) - expected.astype(np.int32))
        worst = int(steps.max(initial=0))
        if self.max_steps is None or worst > self.max_steps:
            self.max_steps, self.worst_quantizer = worst, quantizer
        self._codes += steps.size
        self._moved += int(np.count_nonzero(steps))

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
        simulated: without graph optimizations: Q and DQ as written.
        optimized: with them: integer kernels where there are any.
        quantized_ops: convolutions, Gemms and MatMuls with Q/DQ on both inputs.
        integer_ops: how many of them ran as integer kernels in the optimized graph.
    """

    path: Path
    provider: str
    num_batches: int
    simulated: Comparison
    optimized: Comparison
    quantized_ops: int
    integer_ops: int

    def __str__(self) -> str:
        """Return three lines."""
        return "\n".join(
            [
                f"{self.path} on {self.provider}, {self.num_batches} batches, against torch:",
                f"  optimizations off: {self.simulated}",
                f"  optimizations on:  {self.optimized}",
                f"  {self.integer_ops} of {self.quantized_ops} quantized ops ran as integer kernels",
            ]
        )


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
        provider: ``"cpu"`` or ``"cuda"``.
        num_batches: how many to use at most; None for all.
        inputs: returns the positional arguments of the model for a batch of another kind.

    Raises:
        ValidationError: the provider is missing (says what to install), the file cannot be loaded or
            run, its outputs do not match the model's, or there is no data.
        InvalidTypeError: a batch of another kind without ``inputs``.
    """
    file = Path(path)
    runs = {optimized: Session(file, provider=provider, optimized=optimized) for optimized in (False, True)}
    comparisons = {False: Comparison(), True: Comparison()}
    done = 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fakequant-")))
        graph = ir.load(file)
        quantized_ops = sum(_is_quantized(node) for node in graph.graph.all_nodes())
        cuts = _write_cut(graph, folder / "cut.onnx")
        cut_runs = {
            optimized: Session(folder / "cut.onnx", provider=provider, optimized=optimized)
            for optimized in ((False, True) if cuts else ())
        }
        stack.enter_context(targeted(model, graph.metadata_props.get(TARGET_KEY, "tensorrt")))
        stack.enter_context(evaluating(model))
        for batch in data:
            if num_batches is not None and done >= num_batches:
                break
            feeds, expected, codes = _torch_run(model, batch, inputs, runs[False], cuts)
            for optimized, session in runs.items():
                comparisons[optimized].add_outputs(expected, _outputs(session, feeds, expected))
            for optimized, session in cut_runs.items():
                got = session.run({**_known(feeds, session), **{cut.given: codes[cut] for cut in cuts}})
                for cut in cuts:
                    comparisons[optimized].add_codes(cut.quantizer, codes[cut], got[cut.computed])
            done += 1
    if not done:
        raise ValidationError("data: expected at least one batch, got none")
    return ValidationReport(
        file, provider, done, comparisons[False], comparisons[True], quantized_ops, runs[True].integer_ops
    )


def _is_quantized(node: ir.Node) -> bool:
    return node.op_type in WEIGHTED and all(produced_by(value, "DequantizeLinear") for value in node.inputs[:2])


def _write_cut(graph: ir.Model, path: Path) -> tuple[Cut, ...]:
    cuts = cut_at_quantizers(graph)
    if cuts:
        ir.save(graph, path, external_data="cut.onnx.data")
    return cuts


def _torch_run(
    model: nn.Module,
    batch: Any,
    inputs: Callable[[Any], tuple[Any, ...]] | None,
    session: Session,
    cuts: tuple[Cut, ...],
) -> tuple[dict[str, NDArray[Any]], list[Tensor], dict[Cut, NDArray[Any]]]:
    """Return the file's inputs, the model's outputs and the codes at each cut, for one batch."""
    try:
        args, kwargs = (inputs(batch), {}) if inputs else model_arguments(batch)
    except InvalidTypeError as error:
        raise InvalidTypeError(f"{error}. Pass inputs=lambda batch: (...)") from None
    with _recording(model, {cut.quantizer for cut in cuts}) as calls:
        outputs = model(*args, **kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    feeds = dict(zip(session.inputs, (_array(t) for t in tensors), strict=False))
    feeds |= {name: _array(value) for name, value in kwargs.items() if isinstance(value, Tensor)}
    codes = {cut: _codes(calls, cut) for cut in cuts}
    return feeds, [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)], codes


@contextlib.contextmanager
def _recording(model: nn.Module, names: set[str]) -> Iterator[dict[str, list[NDArray[Any]]]]:
    """Record the codes that the quantizers of these names give, call by call."""
    calls: dict[str, list[NDArray[Any]]] = {name: [] for name in names}

    def record(name: str, quantizer: TensorQuantizer, output: Tensor) -> None:
        scale = quantizer.scale
        if scale is None or not quantizer.is_enabled:
            raise ValidationError(f"{name}: expected it calibrated and enabled as in the file, got {quantizer}")
        # Exact: output is code * scale, and a quotient within half a step rounds to the code.
        calls[name].append(_array(output.to(torch.float32).div(scale).round_()))

    hooks = [
        quantizer.register_forward_hook(lambda module, _, output, name=name: record(name, module, output))
        for name, quantizer in named_quantizers(model)
        if name in names
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _codes(calls: dict[str, list[NDArray[Any]]], cut: Cut) -> NDArray[Any]:
    recorded = calls[cut.quantizer]
    if cut.call >= len(recorded):
        raise ValidationError(
            f"{cut.quantizer}: expected {cut.call + 1} calls in the model as in the file, got {len(recorded)}. "
            "Is this the model that was exported?"
        )
    return (recorded[cut.call] + cut.zero_point).astype(cut.dtype)


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _known(feeds: dict[str, NDArray[Any]], session: Session) -> dict[str, NDArray[Any]]:
    return {name: array for name, array in feeds.items() if name in session.inputs}


def _outputs(session: Session, feeds: dict[str, NDArray[Any]], expected: Sequence[Tensor]) -> list[NDArray[Any]]:
    got = list(session.run(feeds).values())
    shapes = [tuple(tensor.shape) for tensor in expected], [array.shape for array in got]
    if shapes[0] != shapes[1]:
        raise ValidationError(f"{session.path}: expected outputs of shapes {shapes[0]} as in torch, got {shapes[1]}")
    return got
