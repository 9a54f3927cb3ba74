"""IntegerState: parameters as codes and scales by name, and their file."""

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fakequant.errors import CheckpointError
from fakequant.tensor_file import check_path, write_tensors

_SCALE, _ZERO_POINT = ".scale", ".zero_point"


class IntegerTensor(NamedTuple):
    """A tensor as stored: ``value = (codes - zero_point) * scale``.

    Attributes:
        codes: int8, uint8, int16, uint16, int32 (a bias) or float8, shaped like the tensor.
        scale: float32; broadcasts against codes, or has one element a block.
        zero_point: of the codes' dtype, shaped like scale; None for 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


class IntegerState(Mapping[str, IntegerTensor]):
    """{name of a parameter: its integers}.

    Args:
        tensors: by name.
        left_out: {name of a weight that is quantized, or of its bias, that is not here: why}.
    """

    def __init__(self, tensors: Mapping[str, IntegerTensor], left_out: Mapping[str, str]) -> None:
        self._tensors = dict(tensors)
        self.left_out = dict(left_out)

    def __getitem__(self, name: str) -> IntegerTensor:
        """Return one parameter."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return how many parameters there are."""
        return len(self._tensors)

    def __str__(self) -> str:
        """Return one line a parameter."""
        width = max(map(len, (*self, *self.left_out)), default=0)
        lines = [
            f"{name:<{width}}  {str(held.codes.dtype).removeprefix('torch.')} {tuple(held.codes.shape)}, "
            f"{held.scale.numel()} scale{'s' * (held.scale.numel() != 1)}"
            for name, held in self.items()
        ]
        return "\n".join([*lines, *(f"{name:<{width}}  {why}" for name, why in self.left_out.items())])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with ``<name>``, ``<name>.scale`` and ``<name>.zero_point``; whole or not at all.

        Raises:
            InvalidTypeError: no path.
            CheckpointError: it cannot be written.
        """
        check_path(path)
        stored = {}
        for name, held in self.items():
            parts = (("", held.codes), (_SCALE, held.scale), (_ZERO_POINT, held.zero_point))
            stored.update(
                {
                    name + suffix: part.cpu().clone(memory_format=torch.contiguous_format)
                    for suffix, part in parts
                    if part is not None
                }
            )
        write_tensors(path, stored, {"format": "fakequant.integers"})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "IntegerState":
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: no safetensors file, or codes without a scale.
        """
        try:
            stored = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: expected a safetensors file of integers, got: {error}") from error
        beside = {name + suffix for name in stored for suffix in (_SCALE, _ZERO_POINT)}
        names = [name for name in stored if name not in beside]
        if missing := [name for name in names if name + _SCALE not in stored]:
            raise CheckpointError(f"{path}: expected a scale for each tensor, got none for {', '.join(missing)}")
        return cls({n: IntegerTensor(stored[n], stored[n + _SCALE], stored.get(n + _ZERO_POINT)) for n in names}, {})
