"""The stages that an architecture goes through: plan, quantize, calibrate, train, export, check, validate."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from architecture import Architecture
from batches import another
from initial_state import let_values_flow
from outcome import MISSING, OK, Outcome
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fakequant as fq
from fakequant.export.targets import target_named
from fakequant.nn import QuantMixin, registered
from fakequant.nn.walk import named_quantizers, weights_of_quantizers

TARGETS = ("tensorrt", "onnxruntime")
"""What can be exported to; the first is the one that the model is quantized for."""


class _FailedError(Exception):
    """A stage failed; it is in the record."""


class Pipeline:
    """One architecture on its way.

    Args:
        architecture: is built here.
        folder: for the files.
        record: where the outcome is written after every stage, so that a crash leaves what was before it.
        targets: what is exported to.
    """

    def __init__(
        self, architecture: Architecture, folder: Path, record: Path, targets: Sequence[str] = TARGETS
    ) -> None:
        self.outcome = Outcome()
        self._architecture = architecture
        self._folder = folder
        self._record = record
        self._targets = targets

    def run(self) -> Outcome:
        """Run stage after stage until one fails."""
        with contextlib.suppress(_FailedError):
            self._run()
        self.outcome.write(self._record)
        return self.outcome

    def _run(self) -> None:
        with self._stage("build"):
            torch.manual_seed(0)
            model, inputs = self._architecture.build()
            let_values_flow(model, inputs)
        if self._exists("plan", hasattr(fq, "plan")):
            with self._stage("plan"):
                fq.plan(model, inputs, target=TARGETS[0])
        with self._stage("quantize"):
            self._quantize(model, inputs)
        with self._stage("calibrate"):
            batches = [inputs, another(inputs)]
            fq.calibrate(model, batches, "max", forward=lambda m, args: m(*args), progress=False)
        with self._stage("train"):
            _train_step(model, inputs)
        model.eval()
        for target in self._targets:
            self._export(model, inputs, target)

    def _quantize(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weighted = {float_class.__name__ for float_class, cls in registered() if issubclass(cls, QuantMixin)}
        report = fq.quantize(model, "int8", example_inputs=inputs, target=TARGETS[0])
        layers = [layer for layer in report.layers if layer.type in weighted]  # F.linear too is a Linear
        self.outcome.layers = len(layers)
        self.outcome.quantized = sum(layer.is_quantized for layer in layers)

    def _export(self, model: nn.Module, inputs: tuple[Tensor, ...], target: str) -> None:
        path = self._folder / f"{target}.onnx"
        if not self._exists(f"export {target}", _is_target(target)):
            return
        with self._stage(f"export {target}"):
            fq.export_onnx(model, inputs, path, target=target)
        if target == TARGETS[0] and self._exists("readiness", hasattr(fq, "check_onnx")):
            with self._stage("readiness"):
                self.outcome.findings = len(fq.check_onnx(path, target=target).findings)
        with self._stage(f"validate {target}"):
            simulated = fq.validate_onnx(path, model, [inputs], inputs=lambda args: args).simulated
            self.outcome.steps[target] = simulated.max_steps
            self.outcome.sqnr_db[target] = simulated.sqnr_db

    def _exists(self, stage: str, there: bool) -> bool:
        """Whether this fakequant has what a stage calls; if not, that is its result. Decided nowhere else."""
        if not there:
            self.outcome.stages[stage] = MISSING
        return there

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        # What stays if the process ends here.
        self.outcome.stages[name] = "the process ended"
        self.outcome.write(self._record)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # any error of any package is a result here
            self.outcome.stages[name] = f"{type(error).__name__}: {_first_line(error)}"
            raise _FailedError from error
        finally:
            self.outcome.seconds[name] = round(time.perf_counter() - start, 1)
        self.outcome.stages[name] = OK


def _is_target(name: str) -> bool:
    try:
        target_named(name)
    except fq.InvalidValueError:
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])


def _train_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Take one step of SGD; raise if the loss is not finite, nothing has a gradient, or the range of an input moves."""
    weights = weights_of_quantizers(model)
    activations = {name: q for name, q in named_quantizers(model) if q not in weights and q.amax is not None}
    before = {name: q.amax.clone() for name, q in activations.items()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    outputs = [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
    # Random signs: the plain mean behind a LayerNorm is 0 whatever the weights are.
    loss = torch.stack([(t * torch.randn_like(t)).mean() for t in outputs if t.is_floating_point()]).sum()
    if not loss.isfinite():
        raise ArithmeticError(f"expected a finite loss, got {loss.item()}")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of random weights they can be anything
    optimizer.step()
    gradients = [weight.tensor.grad for weight in weights.values()]
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        raise ArithmeticError("expected a gradient at a quantized weight, got none")
    if moved := [name for name, q in activations.items() if not torch.equal(q.amax, before[name])]:
        raise ArithmeticError(f"expected ranges to stay, got another one for {', '.join(moved)}")
