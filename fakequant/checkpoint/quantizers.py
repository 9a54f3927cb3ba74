"""One quantizer as JSON: its grids and switches. Its range is in the state of the model."""

import json
from typing import Any

from fakequant.checkpoint.fields import Fields, as_mapping
from fakequant.descriptor import QuantDescriptor
from fakequant.errors import CheckpointError, FakeQuantError
from fakequant.nn import TensorQuantizer
from fakequant.targets import placement_names

_SWITCHES = {"_disabled": False, "_if_quant": True, "_if_calib": False, "is_weight": False, "saves_memory": False}
"""Attributes that are written where they are not at their defaults."""

_OF_CONSTRUCTION = ("learn_amax", "affine", "block_size", "block_axis")
"""Fields that are the same in the grids of all targets."""


def quantizer_as_json(quantizer: TensorQuantizer, name: str) -> dict[str, Any]:
    """Return a quantizer as JSON.

    Raises:
        CheckpointError: a class of a user's own, which a file cannot name.
    """
    if type(quantizer) is not TensorQuantizer:
        raise CheckpointError(f"{name}: expected a TensorQuantizer, got a subclass of it, {type(quantizer).__name__}")
    fields: dict[str, Any] = {"grid": _grid_as_json(quantizer.descriptor)}
    if quantizer.grids:
        fields["grids"] = {target: _grid_as_json(grid) for target, grid in quantizer.grids.items()}
    for attribute, default in _SWITCHES.items():
        if getattr(quantizer, attribute) != default:
            fields[attribute.lstrip("_")] = not default
    if quantizer.stands_by:
        fields["stands_by"] = True
    if quantizer.momentum is not None:
        fields["momentum"] = float(quantizer.momentum)
    if quantizer.frozen_ends:
        fields["frozen"] = quantizer.frozen_ends
    return fields


def quantizer_from_json(value: object, where: str) -> TensorQuantizer:
    """Return a new quantizer without a range, but for one that its grid fixes.

    Raises:
        CheckpointError: not what ``quantizer_as_json`` returns; a grid that does not exist here.
    """
    with Fields(value, where) as fields:
        grid = _grid_from_json(fields.take_mapping("grid"), f"{where}: grid")
        try:
            quantizer = TensorQuantizer(grid)
        except FakeQuantError as error:  # a calibrator or scheme that is not registered
            raise CheckpointError(f"{where}: {error}") from error
        for target, stored in fields.take_mapping("grids").items():
            quantizer.grids[target] = _grid_of_target(grid, target, stored, f"{where}: grids: {target}")
        learned = dict(quantizer.named_parameters())
        for key in fields.take_names("frozen", learned):
            learned[key].requires_grad_(False)
        quantizer.set_stands_by(fields.take("stands_by", bool, False))  # after that, because it pauses what learns
        for attribute, default in _SWITCHES.items():
            setattr(quantizer, attribute, fields.take(attribute.lstrip("_"), bool, default))
        if "momentum" in fields:
            quantizer.momentum = fields.take("momentum", float)
            if not 0 < quantizer.momentum <= 1:
                raise CheckpointError(
                    f"{where}: momentum: expected a number above 0 and at most 1, got {quantizer.momentum}"
                )
    return quantizer


def _grid_as_json(grid: QuantDescriptor) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(grid.to_json())
    return fields


def _grid_from_json(value: object, where: str) -> QuantDescriptor:
    try:
        return QuantDescriptor.from_dict(as_mapping(value, where))
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:  # what NumPy says of strange numbers too
        raise CheckpointError(f"{where}: {error}") from error


def _grid_of_target(grid: QuantDescriptor, target: str, value: object, where: str) -> QuantDescriptor:
    if target not in placement_names():
        raise CheckpointError(f"{where}: expected a target among {sorted(placement_names())}")
    found = _grid_from_json(value, where)
    for field in _OF_CONSTRUCTION:
        if getattr(found, field) != getattr(grid, field):
            raise CheckpointError(f"{where}: {field}: expected {getattr(grid, field)}, got {getattr(found, field)}")
    return found
