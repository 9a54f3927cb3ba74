"""What processes that calibrate together must have in common."""

import copy

import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant.distributed.description import description
from fakequant.qat import fold_batchnorm


@pytest.mark.parametrize("is_folded", [False, True])
def test_statistics_count_where_a_weight_is_made_of_them(is_folded):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    fq.quantize(model)
    if is_folded:
        fold_batchnorm(model, torch.randn(2, 3, 5, 5))
    other = copy.deepcopy(model)
    other[1].running_var.add_(1)
    assert (description(model, {}, {}) != description(other, {}, {})) == is_folded
