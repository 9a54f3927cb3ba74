"""Learned ranges as Parameters that DistributedDataParallel and fully_shard take, and batch norms that are replaced."""

import copy

import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant import QuantDescriptor
from fakequant.nn import TensorQuantizer
from fakequant.nn.walk import named_quantizers

LEARNED = {
    "lsq": QuantDescriptor(learn_amax="lsq"),
    "lsq+": QuantDescriptor(learn_amax="lsq+", affine=True),
    "pact": QuantDescriptor(learn_amax="pact"),
}
every_method = pytest.mark.parametrize("grid", LEARNED.values(), ids=LEARNED)


def with_range(grid: QuantDescriptor, amax: object = 2.0, amin: object = -1.0) -> TensorQuantizer:
    quantizer = TensorQuantizer(grid)
    quantizer.set_range(amax, amin if grid.affine else None)
    return quantizer


@every_method
def test_a_learned_number_has_one_dimension(grid):
    assert {tuple(parameter.shape) for parameter in with_range(grid).parameters()} == {(1,)}


@every_method
def test_it_is_a_number_to_those_who_compute_with_it(grid):
    quantizer = with_range(grid)
    assert {end.shape for end in (*quantizer.ends, quantizer.scale) if end is not None} == {()}


@every_method
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_it_gets_a_gradient_from_any_input(grid, shape):
    quantizer = with_range(grid)
    output = quantizer(torch.full(shape, 5.0))
    output.sum().backward()
    assert output.shape == shape
    assert quantizer.amax.grad.shape == (1,)
    assert quantizer.amax.grad.abs() > 0


@pytest.mark.parametrize("source", [False, True], ids=["from fixed", "from learned"])
@pytest.mark.parametrize("learned", [False, True], ids=["to fixed", "to learned"])
def test_a_state_goes_from_fixed_to_learned_and_back(source, learned):
    state = with_range(QuantDescriptor(learn_amax=source)).state_dict()
    quantizer = TensorQuantizer(QuantDescriptor(learn_amax=learned))
    quantizer.load_state_dict(state, strict=True)
    assert (quantizer.amax.item(), quantizer.amax.shape) == (2.0, (1,) if learned else ())


def placed() -> nn.Module:
    """Its layers are too small for TensorRT, which leaves them float."""
    model, grid = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), QuantDescriptor(learn_amax="lsq")
    x = torch.randn(2, 8)
    recipe = fq.preset("int8") + fq.Rule(type="Linear", input=grid, weight=grid)
    fq.quantize(model, recipe, example_inputs=x)
    fq.calibrate(model, [x], progress=False)
    return model


def learning(model: nn.Module) -> dict[str, bool]:
    """Whether a learned range requires a gradient, by quantizer."""
    return {n: q.amax.requires_grad for n, q in named_quantizers(model) if q.descriptor.learn_amax}


def test_ranges_of_another_target_require_no_gradient():
    model = placed()
    assert [q.stands_by for _, q in named_quantizers(model)] == [not learns for learns in learning(model).values()]
    assert not any(learning(model).values())


def test_retarget_lets_them_learn():
    model = placed()
    fq.retarget(model, "onnxruntime")
    assert all(learning(model)[name] for name in ("0._input_quantizer", "0._weight_quantizer"))


def test_a_range_that_was_frozen_stays_so_through_other_targets():
    model = placed()
    fq.retarget(model, "onnxruntime")
    model[0].weight_quantizer.amax.requires_grad_(False)
    before = learning(model)
    fq.retarget(model, "tensorrt")
    fq.retarget(model, "onnxruntime")
    assert learning(model) == before


def test_batch_norms_converted_after_quantization_stay_hidden_from_the_add(networks):
    model = networks.quantized("residual")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    x, _ = networks.data("residual")
    assert type(converted[3].norm) is nn.SyncBatchNorm
    assert torch.equal(converted(x), model(x))
