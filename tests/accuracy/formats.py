"""The number formats, one a row of the table: the grids, how ranges are found, how long training goes on."""

import dataclasses

from tasks import DIGITS, PIXELS, SIGNS, TUMOURS, Task

from fakequant import QuantDescriptor, Recipe, Rule, preset


@dataclasses.dataclass(frozen=True)
class Format:
    """A row.

    Args:
        what: grids and how they came about.
        recipe: the grids.
        bar: points that it may lose against float.
        task: network and data.
        method: of the calibration of activations; None where no range comes from data.
        weight_method: of the calibration of weights.
        epochs: of training after that; 0 for none.
        learning_rate: the highest of them.
        gradient_bits: that gradients have in training; None for float.
    """

    what: str
    recipe: Recipe
    bar: float
    task: Task = DIGITS
    method: str | None = "max"
    weight_method: str = "max"
    epochs: int = 0
    learning_rate: float = 0.02
    gradient_bits: int | None = None


def _layers(activation: QuantDescriptor | None, weight: QuantDescriptor, *others: Rule) -> Recipe:
    """Return the recipe that gives every layer these grids, but for other rules."""
    return Recipe(tuple(Rule(type=name, input=activation, weight=weight) for name in ("Conv2d", "Linear")), others)


# The first and the last layer of the two networks on digits, as the papers on few bits have them.
_ENDS_INT8 = (Rule("stem.0"), Rule("fc"))
_ENDS_FLOAT = (Rule("stem*", input=None, weight=None), Rule("fc", input=None, weight=None))


def _trained(what: str, activation: QuantDescriptor, weight: QuantDescriptor, bar: float, method: str) -> Format:
    """Return a format of few bits, fine-tuned from the float network."""
    recipe = _layers(activation, weight, *_ENDS_INT8)
    weight_method = "lsq" if weight.learn_amax else "mse"
    return Format(what, recipe, bar, method=method, weight_method=weight_method, epochs=5)


def _paper(what: str, activation: QuantDescriptor, weight: QuantDescriptor, bar: float, **options: object) -> Format:
    """Return a format whose scales come from no range."""
    return Format(what, _layers(activation, weight, *_ENDS_FLOAT), bar, method=None, epochs=8, **options)


def _binary(what: str, weight: QuantDescriptor) -> Format:
    """Return a binary format. Its steps are large: nothing changes until a weight crosses 0."""
    return _paper(what, QuantDescriptor(1, scheme="bnn"), weight, 6.0, task=SIGNS, learning_rate=1.0)


def _calibrated(num_bits: int, bar: float) -> Format:
    return Format("PTQ", _layers(QuantDescriptor(num_bits), QuantDescriptor(num_bits, axis=0, narrow_range=True)), bar)


def _blocks(size: int) -> Format:
    return Format(f"PTQ, blocks of {size}", _layers(None, QuantDescriptor(4, block_size=size)), 0.5, PIXELS)


def _float8(num_bits: tuple[int, int]) -> Format:
    grid = QuantDescriptor(num_bits)
    return Format("PTQ", _layers(grid, grid.replace(axis=0)), bar=0.5)


def _simulated(num_bits: int | tuple[int, int], block_size: int, scale_format: str, bar: float) -> Format:
    grid = QuantDescriptor(num_bits, block_size=block_size, scale_format=scale_format, dynamic=True)
    return Format(f"blocks of {block_size} with {scale_format} scales", _layers(grid, grid), bar, TUMOURS, None)


_AFFINE8 = QuantDescriptor(8, affine=True)
_CHANNEL8, _CHANNEL4, _CHANNEL3, _CHANNEL2 = (QuantDescriptor(bits, axis=0, narrow_range=True) for bits in (8, 4, 3, 2))
_UINT4, _UINT3, _UINT2 = (QuantDescriptor(bits, unsigned=True) for bits in (4, 3, 2))
_LSQ4, _LSQ3, _LSQ2 = (grid.replace(learn_amax="lsq") for grid in (_CHANNEL4, _CHANNEL3, _CHANNEL2))

FORMATS = {
    "16 bits": _calibrated(16, 0.3),
    "int8, max": Format("PTQ", preset("int8"), 0.3),
    "int8, percentile": Format("PTQ", preset("int8"), 0.3, method="percentile"),
    "int8, mse": Format("PTQ", preset("int8"), 0.3, method="mse", weight_method="mse"),
    "int8 affine": Format("PTQ, zero points on activations", _layers(_AFFINE8, _CHANNEL8), 0.3),
    "int8 affine, weights too": Format("PTQ, zero points everywhere", _layers(_AFFINE8, _AFFINE8.replace(axis=0)), 0.3),
    "int8 dynamic": Format("ranges of each call", preset("dynamic"), 0.3, method=None),
    "int8, powers of two": Format(
        "PTQ, every scale a power of two",
        _layers(*(grid.replace(scale_format="power_of_two") for grid in (QuantDescriptor(8), _CHANNEL8))),
        0.3,
    ),
    "7 bits": _calibrated(7, 0.3),
    "6 bits": _calibrated(6, 0.5),
    "5 bits": _calibrated(5, 1.0),
    "FP8 E4M3": _float8((4, 3)),
    "FP8 E5M2": _float8((5, 2)),
    "4 bits": _trained("QAT, fixed ranges", _UINT4, _CHANNEL4, 1.0, "mse"),
    "4 bits, PACT": _trained(
        "QAT, ranges of activations learned", _UINT4.replace(learn_amax="pact"), _CHANNEL4, 1.0, "max"
    ),
    "4 bits, LSQ": _trained("QAT, all ranges learned", _UINT4.replace(learn_amax="lsq"), _LSQ4, 1.0, "lsq"),
    "4 bits, LSQ+": _trained(
        "QAT, all ranges and zero points learned", _UINT4.replace(affine=True, learn_amax="lsq+"), _LSQ4, 1.0, "mse"
    ),
    "3 bits": _trained("QAT, fixed ranges", _UINT3, _CHANNEL3, 2.0, "mse"),
    "3 bits, LSQ": _trained("QAT, all ranges learned", _UINT3.replace(learn_amax="lsq"), _LSQ3, 2.0, "lsq"),
    "2 bits, LSQ": _trained("QAT, all ranges learned", _UINT2.replace(learn_amax="lsq"), _LSQ2, 3.0, "lsq"),
    "ternary weights": _trained(
        "TWN, QAT, 8-bit activations", QuantDescriptor(8), QuantDescriptor(2, scheme="twn", axis=0), 2.0, "mse"
    ),
    "DoReFa": _paper(
        "QAT, 2-bit weights and activations, 8-bit gradients",
        _UINT2.replace(amax=1.0),
        QuantDescriptor(2, scheme="dorefa"),
        3.0,
        learning_rate=0.1,
        gradient_bits=8,
    ),
    "binary, BNN": _binary("QAT, signs of weights and activations", QuantDescriptor(1, scheme="bnn")),
    "binary, XNOR": _binary("QAT, the same with a scale a filter", QuantDescriptor(1, scheme="xnor", axis=0)),
    "INT4 weights, 32": _blocks(32),
    "INT4 weights, 64": _blocks(64),
    "INT4 weights, 128": _blocks(128),
    "MXFP8": _simulated((4, 3), 32, "e8m0", 0.5),
    "MXFP8 E5M2": _simulated((5, 2), 32, "e8m0", 0.5),
    "MXINT8": _simulated(8, 32, "e8m0", 0.3),
    "NVFP4": _simulated((2, 1), 16, "e4m3", 1.0),
}
