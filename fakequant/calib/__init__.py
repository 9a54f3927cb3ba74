"""Statistics in, amax out. Knows the grid (descriptor, arithmetic) and no module.

===================  ==================================================================
extremes             exact minimum and maximum; NaN and Inf counted
histogram            Histogram: counts that do not depend on order, batches or processes
methods              the registry of search methods
percentile           a given share of the values
entropy              least KL divergence (TensorRT)
mse                  least squared error; the error of any given range
lsq                  where training a step size by LSQ starts
magnitudes           what a grid can represent
search               find_amax: any method, by name; sqnr_db
affine               both ends of the range of an affine grid
calibrator           Calibrator, the base class, and the registry of calibrators
additive             statistics that processes add up, as flat tensors
max                  MaxCalibrator
histogram_calibrator HistogramCalibrator
===================  ==================================================================
"""

from fakequant.calib.affine import Halves, affine_error, affine_sqnr_db, find_range
from fakequant.calib.calibrator import Calibrator, DataRange, calibrator_for, register_calibrator
from fakequant.calib.entropy import entropy
from fakequant.calib.histogram import BINS, Histogram
from fakequant.calib.histogram_calibrator import HistogramCalibrator
from fakequant.calib.lsq import lsq
from fakequant.calib.magnitudes import magnitudes
from fakequant.calib.max import MaxCalibrator
from fakequant.calib.methods import search_method
from fakequant.calib.mse import mse, quantization_error, signal_power
from fakequant.calib.percentile import percentile
from fakequant.calib.search import find_amax, sqnr_db

__all__ = [
    "BINS",
    "Calibrator",
    "DataRange",
    "Halves",
    "Histogram",
    "HistogramCalibrator",
    "MaxCalibrator",
    "affine_error",
    "affine_sqnr_db",
    "calibrator_for",
    "entropy",
    "find_amax",
    "find_range",
    "lsq",
    "magnitudes",
    "mse",
    "percentile",
    "quantization_error",
    "register_calibrator",
    "search_method",
    "signal_power",
    "sqnr_db",
]
