"""Small residual models, the hand-written forward of one, and how they are quantized."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fakequant as fq

NAME = "fakequant_test_residual_models"
FILE = Path(__file__).with_name("residual_models.py")


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """``residual_models.py`` under a name by which a pickle finds it again."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, FILE)
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


@pytest.fixture(scope="session")
def batch() -> torch.Tensor:
    """Eight by eight pixels, sixteen channels; do not change it."""
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantized(batch):
    """Quantize a model in eval mode with some sites forced, and calibrate it so that ranges clip a little."""
    return functools.partial(_quantized, batch)


def _quantized(batch, model, *force, calibrate=True):
    model.eval()
    recipe = fq.preset("int8")
    for name in force:
        recipe = recipe + fq.Rule(name, force=True)
    fq.quantize(model, recipe, example_inputs=(batch,))
    if calibrate:
        fq.calibrate(model, [batch], progress=False)
        for module in model.modules():
            if isinstance(module, fq.TensorQuantizer) and module.axis is None and module.descriptor.amax is None:
                module.amax = module.amax * 0.7
    return model
