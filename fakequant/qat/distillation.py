"""Training a quantized model to do what the float model does: its logits, and features on the way to them.

Logits: Hinton et al. 2015 (arXiv:1503.02531), the divergence of softened probabilities. Features: the squared
error of Romero et al. 2015, "FitNets" (arXiv:1412.6550); teacher and student are of one shape, so no regressor.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from fakequant.arguments import check_module, check_number
from fakequant.arithmetic import DEAD_AMAX
from fakequant.convert import dequantize
from fakequant.errors import InvalidTypeError, InvalidValueError
from fakequant.nn.modes import evaluating
from fakequant.nn.sharding import check_whole


def float_teacher(model: nn.Module) -> nn.Module:
    """Return a float copy of a quantized model with its weights of now, in eval mode and without gradient.

    Raises:
        InvalidTypeError: model is no nn.Module.
        InvalidValueError: its parameters are split over processes.

    >>> from fakequant import quantize
    >>> model = nn.Linear(2, 2)
    >>> _ = quantize(model)
    >>> type(float_teacher(model)) is nn.Linear
    True
    """
    check_module(model)
    check_whole(model)
    return dequantize(copy.deepcopy(model)).eval().requires_grad_(False)


def logits_of(output: Any) -> Tensor:
    """Return an output that is a tensor, or the ``logits`` in it, such as those of transformers.

    Raises:
        InvalidTypeError: any other output.
    """
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise InvalidTypeError(
            f"output: expected a tensor or one with logits, got {type(output).__name__}. "
            "Pass logits=lambda output: ..., or logits=None to compare features only"
        )
    return found


class Distillation:
    """Runs a student, and its teacher on the same batch, and says how far they are apart.

    ::

        distillation = qat.Distillation(qat.float_teacher(model), features=["layer3", "layer4"])
        for images, labels in loader:
            output, distance = distillation(model, images)
            loss = F.cross_entropy(output, labels) + distance

    The distance is ``temperature**2 * KL(teacher || student)`` of the logits, by mean over samples and positions,
    and ``feature_weight`` times the mean over features of ``|student - teacher|**2 / |teacher|**2``, computed in
    float32. The student may be wrapped in DistributedDataParallel or compiled. The teacher runs in eval mode without
    gradient, whatever its own mode, and goes to the student's device. Both run under the caller's autocast. The
    student has hooks during the call only, so no copy and no checkpoint of it holds any.

    Args:
        teacher: the float model; see ``float_teacher``.
        features: names of modules whose outputs are compared, in both models. Not for a compiled student.
        temperature: divides the logits; above 1, improbable classes count for more.
        feature_weight: of the features.
        logits: finds them in an output; None to compare features only.
        class_dim: the dimension of the logits that counts the classes.

    Raises:
        InvalidTypeError: an argument of another kind.
        InvalidValueError: the teacher has no such module; a temperature or weight that is not positive and finite;
            nothing to compare.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        features: Sequence[str] = (),
        temperature: float = 1.0,
        feature_weight: float = 1.0,
        logits: Callable[[Any], Tensor] | None = logits_of,
        class_dim: int = -1,
    ) -> None:
        check_module(teacher)
        check_number("temperature", temperature, above=0)
        check_number("feature_weight", feature_weight, above=0)
        _check_kinds(features, logits, class_dim)
        if logits is None and not features:
            raise InvalidValueError("features: expected names of modules beside logits=None, got none")
        self.teacher = teacher
        self.features = tuple(features)
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.logits = logits
        self.class_dim = class_dim
        _named(teacher, self.features, "teacher")

    def __call__(self, student: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run both models on the same arguments; return the output of the student, and the distance.

        Raises:
            InvalidTypeError: an output without logits; the student is no nn.Module.
            InvalidValueError: the student shares parameters with the teacher, has no such modules, is compiled
                beside features, or gives other shapes; a feature of it has no gradient where one is wanted.
        """
        check_module(student)
        inside = student.module if isinstance(student, DistributedDataParallel) else student
        self._check(inside)
        self._follow(inside)
        with _outputs(_named(inside, self.features, "student")) as of_student:
            output = student(*args, **kwargs)
        with evaluating(self.teacher), _outputs(_named(self.teacher, self.features, "teacher")) as of_teacher:
            target = self.teacher(*args, **kwargs)
        distances = []
        if self.logits is not None:
            distances.append(self._divergence(self.logits(output), self.logits(target)))
        if self.features:
            errors = [_relative_error(name, of_student[name], of_teacher[name]) for name in self.features]
            distances.append(self.feature_weight * torch.stack(errors).mean())
        return output, torch.stack(distances).sum()

    def _check(self, student: nn.Module) -> None:
        if self.features and hasattr(student, "_orig_mod"):
            raise InvalidValueError(
                "student: expected a module that is not compiled beside features, got a compiled one"
            )
        of_teacher = {id(parameter) for parameter in self.teacher.parameters()}
        shared = next((name for name, parameter in student.named_parameters() if id(parameter) in of_teacher), None)
        if shared is not None:
            raise InvalidValueError(
                f"student: expected parameters of its own, got {shared}, which the teacher has, too"
            )

    def _follow(self, student: nn.Module) -> None:
        """Move the teacher to the device of the student."""
        device = next((parameter.device for parameter in student.parameters()), None)
        if device != next((parameter.device for parameter in self.teacher.parameters()), device):
            self.teacher.to(device)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            raise InvalidValueError(f"logits: expected shape {tuple(teacher.shape)}, got {tuple(student.shape)}")
        of_student, of_teacher = (
            F.log_softmax(logits.float() / self.temperature, self.class_dim) for logits in (student, teacher)
        )
        divergence = F.kl_div(of_student, of_teacher, reduction="none", log_target=True)
        return divergence.sum(self.class_dim).mean() * self.temperature**2


def _check_kinds(features: object, logits: object, class_dim: object) -> None:
    if not isinstance(features, Sequence) or isinstance(features, str) or not all(isinstance(f, str) for f in features):
        raise InvalidTypeError(f"features: expected a list of names of modules, got {features!r}")
    if logits is not None and not callable(logits):
        raise InvalidTypeError(f"logits: expected a function of the output, or None, got {logits!r}")
    if isinstance(class_dim, bool) or not isinstance(class_dim, int):
        raise InvalidTypeError(f"class_dim: expected an int, got {class_dim!r}")


def _named(model: nn.Module, names: Sequence[str], role: str) -> dict[str, nn.Module]:
    try:
        return {name: model.get_submodule(name) for name in names}
    except AttributeError as error:
        raise InvalidValueError(f"features: expected names of modules of the {role}: {error}") from None


@contextlib.contextmanager
def _outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the tensors that modules return in a with block, of all their calls in order."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}

    def collect(name: str) -> Callable[..., None]:
        return lambda module, args, output: found[name].extend(
            leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        )

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(collect(name)).remove)
        yield found


def _relative_error(name: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the error of a feature in units of the teacher's power: 1 / SQNR."""
    shapes, expected = ([tuple(tensor.shape) for tensor in side] for side in (student, teacher))
    if shapes != expected or not shapes:
        raise InvalidValueError(f"{name}: expected outputs of shapes {expected or 'some'}, got {shapes or 'none'}")
    if torch.is_grad_enabled() and not all(tensor.requires_grad for tensor in student):
        raise InvalidValueError(
            f"{name}: expected an output with gradient, got one without: it is frozen, "
            "or inside of a checkpoint with use_reentrant=True"
        )
    noise = sum((s.float() - t.float()).square().sum() for s, t in zip(student, teacher, strict=True))
    power = sum(t.float().square().sum() for t in teacher)
    count = sum(t.numel() for t in teacher)
    # A feature of the teacher's that is zero everywhere gives no unit.
    return torch.as_tensor(noise) / torch.as_tensor(power).clamp_min(count * DEAD_AMAX**2)
