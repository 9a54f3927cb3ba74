"""Where LSQ+ starts the ranges of weights: from their mean and standard deviation.

Bhalgat et al. 2020, "LSQ+" (arXiv:2004.09576). Activations start at the least squared error
there, which is ``calibrate(method="mse")``.
"""

import torch
from torch import nn

from fakequant.arithmetic import as_rows, check_amax, kept_shape
from fakequant.arithmetic.learned_ranges import lsq_plus_weight_amax
from fakequant.collecting import naming
from fakequant.errors import InvalidValueError
from fakequant.nn.sharding import reshard, whole
from fakequant.nn.walk import named_quantizers, weights_of_quantizers


def start_lsq_plus(model: nn.Module) -> None:
    """Set the range of every weight that is learned by LSQ where LSQ+ starts it: three standard deviations.

    Args:
        model: quantized, with weights on grids of ``learn_amax="lsq"``.

    Raises:
        InvalidValueError: there is no such weight; one holds NaN or Inf, with its name. Nothing is changed.

    >>> from fakequant import QuantDescriptor
    >>> from fakequant.nn import QuantLinear
    >>> layer = QuantLinear(4, 2, quant_desc_weight=QuantDescriptor(2, learn_amax="lsq"))
    >>> _ = nn.init.constant_(layer.weight, 1.0)
    >>> start_lsq_plus(layer)
    >>> layer.weight_quantizer.amax
    Parameter containing:
    tensor([0.5000], requires_grad=True)
    """
    learned = [(q, w) for q, w in weights_of_quantizers(model).items() if q.descriptor.learn_amax == "lsq"]
    if not learned:
        raise InvalidValueError('model: expected a weight with learn_amax="lsq", got none')
    reshard(model)
    names = {quantizer: name for name, quantizer in named_quantizers(model)}
    found = {}
    for quantizer, weight in learned:
        rows = as_rows(whole(weight.tensor).detach().to(torch.float64), quantizer.axis)
        amax = lsq_plus_weight_amax(rows.mean(1), rows.std(1, correction=0), quantizer.num_bits)  # type: ignore[arg-type]
        with naming(names[quantizer]):
            found[quantizer] = check_amax(amax.reshape(kept_shape(weight.tensor.shape, quantizer.axis)))
    for quantizer, amax in found.items():
        quantizer.replace_range(amax)
