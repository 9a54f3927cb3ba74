"""Recipes as TOML files.

::

    preset = "int8"

    [[rule]]
    name = "head.*"
    float = true
    reason = "loses 0.4 points"

    [[rule]]
    type = "Conv2d"
    weight = {num_bits = 4, axis = 0, narrow_range = true}
    target = "tensorrt"
"""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fakequant.descriptor import QuantDescriptor
from fakequant.errors import FakeQuantError, RecipeError
from fakequant.presets import as_recipe
from fakequant.recipe import Grid, Recipe, Rule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FIELDS = frozenset(field.name for field in dataclasses.fields(Rule))


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a TOML file: a preset's name and a list of rules.

    A rule has the fields of ``Rule``; a grid is "default", "float" or a table of the fields of
    ``QuantDescriptor``; ``float = true`` stands for both grids "float".

    Raises:
        RecipeError: no such file, no TOML, an unknown key or preset, a wrong value; says where.
    """
    try:
        return parse_recipe(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: expected a TOML file, got {error}") from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def parse_recipe(text: str) -> Recipe:
    r"""Read a recipe from TOML text; as ``load_recipe``.

    >>> parse_recipe('preset = "int8"\n[[rule]]\nname = "fc"\nfloat = true').decide("fc", "Linear").is_float
    True
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"expected TOML, got {error}") from None
    if unknown := sorted(set(content) - {"preset", "rule"}):
        raise RecipeError(f"expected the keys preset and rule, got {', '.join(unknown)}")
    rules = content.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise RecipeError("rule: expected tables [[rule]], got something else")
    recipe = as_recipe(_typed(content, "preset", str, "int8"))
    for number, fields in enumerate(rules, start=1):
        try:
            recipe = recipe + _rule(fields)
        except FakeQuantError as error:
            raise RecipeError(f"rule {number}: {error}") from None
    return recipe


def _rule(fields: Mapping[str, Any]) -> Rule:
    values = dict(fields)
    if _typed(values, "float", bool, False):
        values = {"input": "float", "weight": "float", **values}
    values.pop("float", None)
    if unknown := sorted(set(values) - _FIELDS):
        raise RecipeError(f"expected keys among float, {', '.join(sorted(_FIELDS))}, got {', '.join(unknown)}")
    for name in ("input", "weight"):
        if name in values:
            values[name] = _grid(name, values[name])
    return Rule(**values)


def _typed(content: Mapping[str, Any], key: str, expected: type, default: Any) -> Any:
    value = content.get(key, default)
    if not isinstance(value, expected):
        raise RecipeError(f"{key}: expected a {expected.__name__}, got {value!r}")
    return value


def _grid(name: str, value: object) -> QuantDescriptor | Grid | None:
    if isinstance(value, Mapping):
        return QuantDescriptor.from_dict(value)
    named = {"default": Grid.DEFAULT, "float": None}
    if not isinstance(value, str) or value not in named:
        raise RecipeError(f'{name}: expected "default", "float" or a table of descriptor fields, got {value!r}')
    return named[value]
