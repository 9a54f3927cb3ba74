"""The forms of a class: what modules of it become in place, by their ``__class__``, and stop being again.

A quantized class is a form of its float class. The others, such as the unfused transformer
encoder, are registered here, so that a saved model's modules find theirs by name.
"""

from collections.abc import Mapping

from torch import nn

from fakequant.nn.registry import float_class_of, is_given, quantized_class_of

_PLAIN_OF: dict[type[nn.Module], type[nn.Module]] = {}


def register_forms(forms: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Register {class: what its modules may become}; both have parameters and buffers of the same names."""
    _PLAIN_OF.update({form: plain for plain, form in forms.items()})


def plain_class_of(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a form is one of; any other class itself.

    >>> from fakequant.nn import QuantLinear
    >>> plain_class_of(QuantLinear).__name__, plain_class_of(nn.ReLU).__name__
    ('Linear', 'ReLU')
    """
    found = float_class_of(cls) if is_given(cls) else _PLAIN_OF.get(cls)
    return cls if found is None else found


def form_named(plain: type[nn.Module], name: str) -> type[nn.Module] | None:
    """Return the form of exactly this class that has a name, None if it has no such form."""
    forms = [form for form, of in _PLAIN_OF.items() if of is plain]
    return next((form for form in (quantized_class_of(plain), *forms) if form and form.__name__ == name), None)
