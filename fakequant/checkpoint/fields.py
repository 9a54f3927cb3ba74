"""Reading JSON from outside: every field by its type, once, with errors that say where."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from fakequant.errors import CheckpointError

_T = TypeVar("_T")


class Fields:
    """The fields of a JSON object; leaving the with block, there must be none that was not read.

    Args:
        value: the object.
        where: what errors call it.

    Raises:
        CheckpointError: no object; a field that is missing, unknown, or of another type.
    """

    def __init__(self, value: object, where: str) -> None:
        self.where = where
        self._left: dict[str, object] = dict(as_mapping(value, where))

    def __enter__(self) -> "Fields":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None and self._left:
            raise CheckpointError(f"{self.where}: expected no other fields, got {sorted(self._left)[:5]}")

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, expected: type[_T], default: _T | None = None) -> _T:
        """Return a field of exactly this type; without a default it must be there."""
        if name not in self._left and default is not None:
            return default
        return as_type(self._left.pop(name, None), expected, f"{self.where}: {name}")

    def take_names(self, name: str, known: Collection[str]) -> tuple[str, ...]:
        """Return a list of known names; none where it is not there."""
        found = self.take(name, list, [])
        if unknown := [item for item in found if not isinstance(item, str) or item not in known]:
            raise CheckpointError(f"{self.where}: {name}: expected names among {sorted(known)}, got {unknown[:5]}")
        return tuple(found)

    def take_mapping(self, name: str) -> Mapping[str, Any]:
        """Return an object as it is; an empty one where it is not there."""
        return as_mapping(self._left.pop(name, {}), f"{self.where}: {name}")


def as_type(value: object, expected: type[_T], where: str) -> _T:
    """Return a value of exactly this type: True is no int."""
    if type(value) is not expected:
        raise CheckpointError(f"{where}: expected {expected.__name__}, got {type(value).__name__}")
    return value


def as_mapping(value: object, where: str) -> Mapping[str, Any]:
    """Return a JSON object."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise CheckpointError(f"{where}: expected an object, got {type(value).__name__}")
    return value
