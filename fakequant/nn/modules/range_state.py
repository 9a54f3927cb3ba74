"""The lasting state of a quantizer: its range, amax, and for an affine grid amin.

The buffer ``_amax`` is there from construction. While no range is known it has no
elements (shape ``(0,)``), so "calibrated" is a property of its shape: it survives
state_dict, deepcopy, pickle, ``.to()``, and reading it costs no device synchronization.
``_amin`` is the same, and there only where the grid has a zero point.

A learned range is Parameters. One of a single number has shape ``(1,)``: torch's ``fully_shard``
takes no Parameter without dimensions. Whoever reads it for arithmetic gets it 0-d.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fakequant import arithmetic
from fakequant.errors import InvalidValueError
from fakequant.nn.sharding import is_sharded, split_like
from fakequant.nn.snapshot import snapshot

AMAX, AMIN = "_amax", "_amin"


class RangeState(nn.Module):
    """A module whose state is one range, in float32 whatever the dtype of the model around it.

    Args:
        affine: the range has a lower end of its own, amin.
        learned: make the range Parameters instead of buffers.
    """

    _amax: Tensor
    _learning: list[bool]
    """While learning is paused, which of the learned ends were."""

    def __init__(self, *, affine: bool = False, learned: bool = False) -> None:
        super().__init__()
        self.range_keys = (AMAX, AMIN) if affine else (AMAX,)
        """Names of the tensors that hold the range."""
        for key in self.range_keys:
            empty = torch.empty(0, dtype=torch.float32)
            if learned:
                self.register_parameter(key, nn.Parameter(empty))
            else:
                self.register_buffer(key, empty)

    @property
    def is_calibrated(self) -> bool:
        """Whether the range is known."""
        return self._amax.numel() > 0

    @property
    def amax(self) -> Tensor | None:
        """The range, float32: 0-d, or with the kept axes' sizes and 1 elsewhere. None while unknown.

        A learned one is the Parameter itself, of shape (1,) in place of 0-d.

        Assigning checks that it is finite and not negative; None forgets it. A shape
        other than that of the present amax is an error: forget that one first. The
        lower end of an affine grid becomes -amax; see ``set_range``.
        """
        return self._amax if self.is_calibrated else None

    @amax.setter
    def amax(self, value: object) -> None:
        if value is None:
            self._check_whole()
            for key in self.range_keys:
                self._replace(key, torch.empty(0, dtype=torch.float32, device=self._amax.device))
            return
        amax = arithmetic.check_amax(value)
        self.set_range(amax, -amax if AMIN in self.range_keys else None)

    @property
    def amin(self) -> Tensor | None:
        """The lower end of the range, at most 0, shaped like amax. None while unknown, and for a symmetric grid."""
        return getattr(self, AMIN) if AMIN in self.range_keys and self.is_calibrated else None

    @property
    def is_whole(self) -> bool:
        """Whether ``fully_shard`` has not split it over processes."""
        return not is_sharded(self._amax)

    @property
    def ends(self) -> tuple[Tensor | None, Tensor | None]:
        """(amax, amin) without gradient and with their signs: an optimizer may have turned those of learned ones."""
        if not self.is_calibrated:
            return None, None
        amax, amin = self._kept()
        return amax.detach().abs(), None if amin is None else -amin.detach().abs()

    def _kept(self) -> tuple[Tensor, Tensor | None]:
        """Return amax and amin as they are kept, but a learned number 0-d."""
        self._check_whole()
        kept = [getattr(self, key) for key in self.range_keys]
        if self._amax.dtype != torch.float32:
            raise InvalidValueError(
                f"amax: expected a learned range in float32, got {self._amax.dtype}. FSDP's mixed precision casts "
                "Parameters: shard the quantizers that learn as a group of their own, before the layers around them: "
                "fully_shard(quantizers, mp_policy=MixedPrecisionPolicy())"
            )
        amax, *amin = [_number(value) if isinstance(value, nn.Parameter) else value for value in kept]
        return amax, amin[0] if amin else None

    def set_range(self, amax: object, amin: object = None) -> None:
        """Set both ends of the range; amin for an affine grid only.

        A learned range that ``fully_shard`` has split is set in each process that calls this.

        Raises:
            InvalidTypeError: an end that is no number or tensor.
            InvalidValueError: an end of the wrong sign, not finite, or of another shape than the present one.
        """
        new = self._as_ends(amax, amin)
        for key, value in new.items():
            present = getattr(self, key)
            if present.numel() > 0 and value.shape != present.shape:
                raise InvalidValueError(f"{key[1:]}: expected shape {tuple(present.shape)}, got {tuple(value.shape)}")
        self._store(new)

    def replace_range(self, amax: object, amin: object = None) -> None:
        """Do the same as ``set_range``, but the shape may be another than the present one.

        Where it is not, the tensors stay what they are: an optimizer goes on training a learned range.
        """
        self._store(self._as_ends(amax, amin))

    def _as_ends(self, amax: object, amin: object) -> dict[str, Tensor]:
        """Return the ends of a new range by key, as they are kept."""
        if (amin is None) != (AMIN not in self.range_keys):
            expected = "None on a symmetric grid" if AMIN not in self.range_keys else "the lower end of an affine grid"
            raise InvalidValueError(f"amin: expected {expected}, got {amin!r}")
        new = {AMAX: arithmetic.check_amax(amax)}
        if amin is not None:
            new[AMIN] = arithmetic.check_amin(amin)
            if new[AMIN].shape != new[AMAX].shape:
                raise InvalidValueError(f"amin: expected shape {tuple(new[AMAX].shape)}, got {tuple(new[AMIN].shape)}")
        return {key: self._as_kept(key, value) for key, value in new.items()}

    def _store(self, new: dict[str, Tensor]) -> None:
        for key, value in new.items():
            present = getattr(self, key)
            if value.shape != present.shape:
                self._check_whole()
                self._replace(key, value.to(present.device, torch.float32, copy=True))
            else:
                with torch.no_grad():
                    present.copy_(split_like(value, present))

    def follow_range(self, amax: Tensor, amin: Tensor | None, momentum: float) -> None:
        """Move the range towards another one by a share of the way, without gradient; all of it while unknown.

        An end that is not finite, as of a step that overflowed, moves nothing.
        """
        ends = [(AMAX, amax), (AMIN, amin)] if amin is not None else [(AMAX, amax)]
        with torch.no_grad():
            if not self.is_calibrated and not all(bool(end.isfinite().all()) for _, end in ends):
                return
            for key, value in ends:
                present, new = getattr(self, key), value.to(torch.float32)
                if present.numel() == 0:
                    self._replace(key, new.clone())
                else:
                    new = new.reshape(present.shape)
                    before = snapshot(present) if torch.compiler.is_compiling() else present
                    present.copy_(before.lerp(new.where(new.isfinite(), before), momentum))

    def _check_whole(self) -> None:
        if not self.is_whole:
            raise InvalidValueError(
                "amax: expected a learned range as a whole, got one that fully_shard has split over processes. "
                "Calibrate before, and read it from the full state_dict (torch.distributed.checkpoint.state_dict)"
            )

    def _pause_learning(self, paused: bool) -> None:
        """Take the gradient from a learned range, or give back what it had.

        DistributedDataParallel waits for the gradient of every Parameter that requires one, used or not.
        """
        learned = [value for key in self.range_keys if isinstance(value := getattr(self, key), nn.Parameter)]
        if paused:
            self._learning = [value.requires_grad for value in learned]
        for value, was_learning in zip(learned, self._learning, strict=True):
            value.requires_grad_(was_learning and not paused)

    def _as_kept(self, key: str, value: Tensor) -> Tensor:
        """Return an end in the shape in which it is kept: a number is a buffer 0-d, or a Parameter of shape (1,)."""
        if not isinstance(getattr(self, key), nn.Parameter):
            return _number(value)
        return value.reshape(1) if value.ndim == 0 else value

    def _replace(self, key: str, value: Tensor) -> None:
        present = getattr(self, key)
        if isinstance(present, nn.Parameter):
            present.data = value
            present.grad = None
        else:
            setattr(self, key, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RangeState":
        """Follow device moves but stay float32: half() would lose ranges above 65504 and below 6e-8."""
        before = {key: getattr(self, key).detach() for key in self.range_keys}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, value in before.items():
            if getattr(self, key).dtype != torch.float32:
                self._replace(key, value.to(getattr(self, key).device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save a range that layers share under its first name only: safetensors takes no tensor under several."""
        memory = self._amax.untyped_storage()._cdata
        if not any(k.endswith(AMAX) and v.untyped_storage()._cdata == memory for k, v in destination.items()):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over the checkpoint's range, known or not; one without (a float model's) changes nothing."""
        stored = {key: state_dict.get(prefix + key) for key in self.range_keys}
        for key, value in stored.items():
            if isinstance(value, Tensor) and not value.is_meta and not self._can_be(key, value):
                expected = "finite values <= 0" if key == AMIN else "finite values >= 0"
                error_msgs.append(f"{prefix}{key}: expected {expected}, got {value}")
                return
        for key, value in stored.items():
            present = getattr(self, key)
            if isinstance(value, Tensor):
                state_dict[prefix + key] = kept = self._as_kept(key, value)
                if kept.shape != present.shape:
                    self._replace(key, present.detach().new_empty(kept.shape))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for key in self.range_keys:
            if prefix + key in missing_keys:
                missing_keys.remove(prefix + key)
            if getattr(self, key).dtype != torch.float32:  # assign=True
                self._replace(key, getattr(self, key).detach().to(torch.float32))

    def _can_be(self, key: str, value: Tensor) -> bool:
        """Whether a checkpoint's value is one: a learned one may have any sign, only its magnitude counts."""
        outward = -value if key == AMIN else value
        return bool((value.isfinite() & ((outward >= 0) | isinstance(getattr(self, key), nn.Parameter))).all())

    def _short_range(self) -> str:
        if not self.is_calibrated:
            return "dynamic"
        if not self.is_whole:
            return "sharded"
        if self._amax.is_meta:
            return "meta"
        ends = [end for end in reversed(self.ends) if end is not None]
        if self._amax.numel() == 1:
            return " to ".join(f"{end.item():.4f}" for end in ends)
        return f"[{ends[0].min().item():.4f}, {ends[-1].max().item():.4f}]({self._amax.numel()})"


def _number(tensor: Tensor) -> Tensor:
    """Return a tensor of shape (1,) without dimensions, any other as it is."""
    return tensor.reshape(()) if tensor.shape == (1,) else tensor
