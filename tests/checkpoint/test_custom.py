"""Quantized classes and ops of a user's own: found by name among those that are registered."""

import pytest
import torch
from torch import nn

import fakequant as fq
from fakequant.call_sites import custom, ops
from fakequant.errors import CheckpointError
from fakequant.nn import registry


@torch.library.custom_op("fakequant_checkpoint_test::scale_rows", mutates_args=())
def scale_rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w


class Scaled(nn.Module):
    """A layer of a user's own, and an op of a user's own behind it."""

    def __init__(self):
        super().__init__()
        self.layer = Layer(16, 16)
        self.rows = nn.Parameter(torch.randn(4, 1))

    def forward(self, x):
        return scale_rows(self.layer(x), self.rows)


class Layer(nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()


class QuantLayer(fq.nn.QuantLinear, Layer):
    """Its init_quantizer makes more than quantizers."""

    def init_quantizer(self, *grids):
        super().init_quantizer(*grids)
        self.gain = 2.0

    def forward(self, input):
        return self.gain * super().forward(input).relu()


@pytest.fixture(autouse=True)
def _tables_put_back():
    # Other modules hold the same dicts, so their contents are put back and not the dicts.
    tables = (ops._OPS, ops._OP_OF, ops.KIND_OF, custom.TRANSLATIONS, registry._QUANTIZED)
    before = [dict(table) for table in tables]
    yield
    for table, contents in zip(tables, before, strict=True):
        table.clear()
        table.update(contents)


@pytest.fixture
def x():
    return torch.randn(4, 16)


@pytest.fixture
def model(x, path):
    """Saved."""
    registry.register(Layer)(QuantLayer)
    fq.register_op(scale_rows, inputs=("x",), weights={"w": None})
    model = Scaled()
    fq.quantize(model, example_inputs=(x,))
    fq.calibrate(model, [x], progress=False)
    assert [site.kind for _, site in fq.call_sites.call_sites(model)] == ["scale_rows"]
    fq.save_quantized(model, path)
    return model


def test_a_model_with_both_is_the_same_again(model, x, path):
    other = fq.load_quantized(Scaled(), path)
    assert type(other.layer) is QuantLayer
    assert torch.equal(other(x), model(x))


def test_a_class_that_is_not_registered_is_named(model, path, refuses):
    del registry._QUANTIZED[Layer]
    refuses(Scaled(), "layer: expected a class QuantLayer for Layer, got none; register it before loading")


def test_an_op_that_is_not_registered_is_named(model, path, refuses):
    del ops._OPS["scale_rows"]
    refuses(Scaled(), "scale_rows_0: expected a known op, got 'scale_rows'; call register_op before loading")


def test_a_class_that_refuses_the_layer_is_named(model, path, refuses, monkeypatch):
    monkeypatch.setattr(QuantLayer, "input_names", ("input", "other"))
    refuses(Scaled(), r"layer: expected a quantizer for each input, got none for \['other'\]")


def test_a_manifest_that_does_not_fit_changes_nothing_either(model, contents):
    manifest = fq.manifest_of(model)
    del registry._QUANTIZED[Layer]
    other = Scaled()
    before = contents(other)
    with pytest.raises(CheckpointError, match="^layer: expected a class QuantLayer"):
        fq.quantize_like(other, manifest)
    assert contents(other) == before


def test_a_range_that_init_quantizer_refuses(model, path, refuses):
    QuantLayer.default_quant_desc_weight = fq.QuantDescriptor(8, fake_quant=False)
    refuses(Scaled(), "layer: quant_desc_weight: expected fake_quant=True")
