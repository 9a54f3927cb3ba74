"""find_amax: histogram in, amax out, by any registered method; and how good a range is, in dB."""

import torch
from torch import Tensor

from fakequant.arithmetic import grid_parameters, maxbound_of
from fakequant.calib.histogram import Histogram
from fakequant.calib.magnitudes import magnitudes
from fakequant.calib.methods import METHODS, checked_method, methods_for, search_method
from fakequant.calib.mse import decibels, quantization_error, signal_power
from fakequant.calib.percentile import check_percentile
from fakequant.descriptor import QuantDescriptor

_AUTO_ORDER = ("max", "entropy", "percentile", "mse")


def find_amax(histogram: Histogram, descriptor: QuantDescriptor, method: str, *, percentile: float = 99.99) -> Tensor:
    """Return the range of each row.

    The search runs on the CPU, on 32 KiB a row: parallel float sums on a GPU differ from run to run.

    Args:
        histogram: of [rows], on any device.
        descriptor: the grid; only num_bits, unsigned and scale_format matter.
        method: "max", "entropy", "percentile", "mse", "auto" or any other registered name.
        percentile: for the method of that name, above 1 and at most 100.

    Returns:
        amax, float32 [rows] on the histogram's device; never above ``histogram.amax``, but for "lsq"; 0
        for a row without data.

    Raises:
        InvalidValueError: an unknown method, or one that does not work on this grid; a percentile out of range.
        InvalidTypeError: a percentile that is no number.

    >>> find_amax(Histogram.of(torch.arange(1001.0)), QuantDescriptor(8), "max")
    tensor([1000.])
    """
    check_percentile(percentile)
    search = checked_method(method, descriptor).search
    return search(histogram.to("cpu"), descriptor, percentile).to(histogram.counts.device)


def sqnr_db(histogram: Histogram, amax: Tensor, descriptor: QuantDescriptor) -> Tensor:
    """Return the signal-to-quantization-noise ratio of each row, float64 [rows], in dB.

    Args:
        histogram: of [rows].
        amax: the range of each row, of any shape with ``rows`` elements.
        descriptor: the grid.

    A row that the grid holds without any error has +inf.

    >>> sqnr_db(Histogram.of(torch.linspace(0, 1, 100_001)), torch.tensor(1.0), QuantDescriptor(8)).round()
    tensor([48.], dtype=torch.float64)
    """
    noise = quantization_error(histogram, _in_use(amax, descriptor), magnitudes(descriptor))
    return decibels(signal_power(histogram), noise)


@search_method("auto", on_weights=False)
def _least_error(histogram: Histogram, descriptor: QuantDescriptor, percentile: float) -> Tensor:
    """Return, row by row, the range of the method with the least quantization error; ties go to the first."""
    grid = magnitudes(descriptor)
    names = sorted(methods_for(descriptor).keys() - {"auto"}, key=_rank)
    ranges = torch.stack([METHODS[name].search(histogram, descriptor, percentile) for name in names])
    errors = torch.stack([quantization_error(histogram, _in_use(amax, descriptor), grid) for amax in ranges])
    return ranges.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def _in_use(amax: Tensor, descriptor: QuantDescriptor) -> Tensor:
    """Return the range that the grid has in the end: its scale may be rounded."""
    if descriptor.scale_format == "float32":
        return amax
    return grid_parameters(descriptor, amax).scale * maxbound_of(descriptor)


def _rank(name: str) -> tuple[int, str]:
    return (_AUTO_ORDER.index(name) if name in _AUTO_ORDER else len(_AUTO_ORDER), name)
