"""Containers that own call sites: what iterates over them must not meet the sites.

A subclass of nn.Sequential, ModuleList or ModuleDict whose forward goes through its own
items (torchvision's DenseNet does) would call them like one more layer.
"""

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from torch import nn

CALL_SITES = "_call_sites"
"""Name of the child that holds a module's call sites."""


class _Listed(nn.Module):
    """nn.Sequential and nn.ModuleList."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(_items(self).values())

    def __len__(self) -> int:
        return len(_items(self))


class _Named(nn.Module):
    """nn.ModuleDict."""

    def __iter__(self) -> Iterator[str]:
        return iter(_items(self))

    def __len__(self) -> int:
        return len(_items(self))

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return _items(self).keys()

    def items(self) -> ItemsView[str, nn.Module]:
        """Return names and modules."""
        return _items(self).items()

    def values(self) -> ValuesView[nn.Module]:
        """Return the modules."""
        return _items(self).values()


def hiding_base(cls: type[nn.Module]) -> tuple[type[Any], ...]:
    """Return the base class, if any, that hides the sites of an owner of this class from its own iteration."""
    if issubclass(cls, nn.ModuleDict):
        return (_Named,)
    return (_Listed,) if issubclass(cls, nn.Sequential | nn.ModuleList) else ()


def _items(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if name != CALL_SITES}  # type: ignore[misc]
