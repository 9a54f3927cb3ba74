"""Helpers for quantization-aware training."""

from fakequant.qat.batchnorm import freeze_batchnorm, unfreeze_batchnorm
from fakequant.qat.bit_widths import lower_bits
from fakequant.qat.checks import CheckReport, check
from fakequant.qat.distillation import Distillation, float_teacher
from fakequant.qat.fine_tuning import FineTuning
from fakequant.qat.folding import FoldReport, fold_batchnorm, unfold_batchnorm
from fakequant.qat.gradients import QuantizedGradients, quantize_gradients
from fakequant.qat.lsq_plus import start_lsq_plus
from fakequant.qat.memory import save_memory, stop_saving_memory
from fakequant.qat.moving_average import follow_ranges, freeze_ranges
from fakequant.qat.parameter_groups import parameter_groups
from fakequant.qat.phases import Phases
from fakequant.qat.processes import average_ranges, broadcast_ranges
from fakequant.qat.watching import Watch, watch
from fakequant.qat.weight_ranges import reestimate_weights

__all__ = [
    "CheckReport",
    "Distillation",
    "FineTuning",
    "FoldReport",
    "Phases",
    "QuantizedGradients",
    "Watch",
    "average_ranges",
    "broadcast_ranges",
    "check",
    "float_teacher",
    "fold_batchnorm",
    "follow_ranges",
    "freeze_batchnorm",
    "freeze_ranges",
    "lower_bits",
    "parameter_groups",
    "quantize_gradients",
    "reestimate_weights",
    "save_memory",
    "start_lsq_plus",
    "stop_saving_memory",
    "unfold_batchnorm",
    "unfreeze_batchnorm",
    "watch",
]
