"""One range for what is moved, cut or joined; one quantizer for each such range, weight and call."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fakequant as fq


class Net(nn.Module):
    """Runs a function of itself; its children come by name."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def conv(inputs=16, outputs=16, kernel=3):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def quantized(model, *inputs, calibrate=False, **options):
    model.eval()
    fq.quantize(model, example_inputs=inputs)
    if calibrate:
        fq.calibrate(model, [inputs], forward=lambda m, batch: m(*batch), progress=False, **options)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 16, 8, 8)


def share_a_range(x, move, channels=16):
    """Whether what is moved has one quantizer with what it becomes; convolutions read both."""

    def forward(m, x):
        y = x.relu()
        return m.before(y), m.behind(move(y))

    model = quantized(Net(forward, before=conv(), behind=conv(channels)), x)
    return model.before.input_quantizer is model.behind.input_quantizer


MOVES = {
    "reshape": lambda y: y.reshape(2, 16, 4, 16),
    "view": lambda y: y.view(2, 16, 4, 16),
    "flatten and unflatten": lambda y: y.flatten(1).unflatten(1, (16, 8, 8)),
    "transpose": lambda y: y.transpose(2, 3),
    "permute": lambda y: y.permute(0, 1, 3, 2),
    "mT": lambda y: y.mT,
    "squeeze and unsqueeze": lambda y: y.unsqueeze(0).squeeze(0),
    "slice": lambda y: y[:, :, 2:, ::2],
    "index": lambda y: y[0],
    "narrow": lambda y: y.narrow(2, 0, 4),
    "flip": lambda y: y.flip(3),
    "roll": lambda y: torch.roll(y, 1, 3),
    "gather": lambda y: torch.index_select(y, 0, torch.tensor([1, 0])),
    "max pool": lambda y: F.max_pool2d(y, 2),
    "max pool with padding": lambda y: F.max_pool2d(y, 3, 1, 1),
    "adaptive max pool": lambda y: F.adaptive_max_pool2d(y, 4),
    "max pool module": nn.MaxPool2d(2),
    "nearest": lambda y: F.interpolate(y, scale_factor=2),
    "nearest by name": lambda y: F.interpolate(y, scale_factor=2, mode="nearest"),
    "nearest-exact": lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact"),
    "upsample module": nn.Upsample(scale_factor=2),
    "zero pad": lambda y: F.pad(y, (1, 1, 1, 1)),
    "zero pad by name": lambda y: F.pad(y, (1, 1, 1, 1), mode="constant", value=0),
    "zero pad module": nn.ZeroPad2d(1),
    # Every element that reflection adds is one of the tensor's own.
    "reflect pad": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "replicate pad": nn.ReplicationPad2d(1),
    "dropout": nn.Dropout(),
    "clone": lambda y: y.clone(),
    "contiguous": lambda y: y.contiguous(),
    "expand": lambda y: y[:1].expand(3, 16, 8, 8),
    "repeat": lambda y: y.repeat(1, 1, 2, 1),
    "chain": lambda y: F.max_pool2d(F.pad(y, (1, 1, 1, 1)).transpose(2, 3), 2)[:, :, 1:],
}
BREAKS = {
    "pad with another value": lambda y: F.pad(y, (1, 1, 1, 1), "constant", 1.0),
    "pad with a value by name": lambda y: F.pad(y, (1, 1, 1, 1), value=1.0),
    "constant pad module": nn.ConstantPad2d(1, 3.0),
    "bilinear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "bilinear module": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic by position": lambda y: F.interpolate(y, None, 2, "bicubic"),
    "average pool": lambda y: F.avg_pool2d(y, 2),
    "mean": lambda y: y.mean((2, 3), keepdim=True),
    "relu": lambda y: y.relu(),
    "sigmoid": lambda y: y.sigmoid(),
    "scale": lambda y: y * 2,
    "shift": lambda y: y + 1,
    "sum": lambda y: y + y.exp(),
    "norm": nn.BatchNorm2d(16),
    "convolution": conv(),
    "moved, then not": lambda y: y.flip(3).relu(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_one_range_before_and_behind(x, move):
    assert share_a_range(x, move)


@pytest.mark.parametrize("change", BREAKS.values(), ids=BREAKS)
def test_another_range_behind(x, change):
    assert not share_a_range(x, change)


CUTS = {
    "chunk": lambda y: y.chunk(2, 1),
    "split": lambda y: y.split(16, 1),
    "split in sizes": lambda y: torch.split(y, [16, 16], 1),
    "tensor_split": lambda y: torch.tensor_split(y, 2, 1),
    "slices": lambda y: (y[:, :16], y[:, 16:]),
    "unbind": lambda y: y.view(2, 2, 16, 8, 8).unbind(1),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_the_parts_have_the_range_of_the_whole(cut):
    def forward(m, x):
        y = x.relu()
        one, other = cut(y)
        return m.whole(y), m.one(one), m.other(other)

    model = quantized(Net(forward, whole=conv(32), one=conv(), other=conv()), torch.randn(2, 32, 8, 8))
    assert model.whole.input_quantizer is model.one.input_quantizer is model.other.input_quantizer


JOINS = {
    "cat": lambda a, b: torch.cat([a, b], 1),
    "cat of a tuple": lambda a, b: torch.cat((a, b), dim=1),
    "concat": lambda a, b: torch.concat([a, b], 1),
    "by keyword": lambda a, b: torch.cat(tensors=[a, b], dim=1),
    "stack": lambda a, b: torch.stack([a, b], 1).flatten(1, 2),
}


def joined(join):
    def forward(m, x):
        one, other = x.relu(), x.sigmoid()
        return m.one(one), m.other(other), m.both(join(one, other))

    return Net(forward, one=conv(), other=conv(), both=conv(32))


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
class TestCat:
    def test_parts_and_whole_have_one_range(self, x, join):
        model = quantized(joined(join), x)
        assert model.one.input_quantizer is model.other.input_quantizer is model.both.input_quantizer

    def test_it_is_that_of_the_largest(self, x, join):
        model = quantized(joined(join), x, calibrate=True)
        expected = np.max([np.abs(x.relu().numpy()).max(), np.abs(x.sigmoid().numpy()).max()])
        assert model.one.input_quantizer.amax.item() == expected


class TestCatOfMore:
    def test_two_cats_with_a_part_in_common_have_one_range(self, x):
        def forward(m, x):
            a, b, c = x.relu(), x.sigmoid(), x.tanh()
            return m.one(torch.cat([a, b], 1)), m.other(torch.cat([b, c], 1))

        model = quantized(Net(forward, one=conv(32), other=conv(32)), x)
        assert model.one.input_quantizer is model.other.input_quantizer

    def test_two_cats_without_have_two(self, x):
        def forward(m, x):
            return m.one(torch.cat([x.relu(), x.exp()], 1)), m.other(torch.cat([x.tanh(), x.sigmoid()], 1))

        model = quantized(Net(forward, one=conv(32), other=conv(32)), x)
        assert model.one.input_quantizer is not model.other.input_quantizer

    def test_a_constant_part_counts_in_the_whole(self, x):
        model = Net(lambda m, x: m.a(torch.cat([x, torch.full((2, 16, 8, 8), 50.0)], 1)), a=conv(32))
        assert quantized(model, x, calibrate=True).a.input_quantizer.amax.item() == 50.0

    def test_a_cat_of_convolutions_is_quantized_where_it_is_read(self, x):
        model = Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(), b=conv(), c=conv(32))
        edges = {edge.name: edge for edge in fq.plan(model, x).report.edges}
        assert [edges[f"cat_0.tensors_{index}"].descriptor for index in (0, 1)] == [None, None]
        assert edges["c.input"].descriptor is not None


class TestReadersOfOneTensor:
    def test_parallel_branches_share(self, x):
        model = quantized(Net(lambda m, x: (m.a(x), m.b(x), m.c(x)), a=conv(), b=conv(kernel=1), c=conv(16, 32)), x)
        assert model.a.input_quantizer is model.b.input_quantizer is model.c.input_quantizer

    def test_convolution_and_linear_share(self, x):
        model = quantized(Net(lambda m, x: (m.a(x), m.fc(x.flatten(1))), a=conv(), fc=nn.Linear(1024, 16)), x)
        assert model.a.input_quantizer is model.fc.input_quantizer

    def test_layer_and_average_pool_share(self, x):
        model = Net(
            lambda m, x: (m.a(x), m.fc(m.pool(x).flatten(1))),
            a=conv(),
            pool=nn.AdaptiveAvgPool2d(1),
            fc=nn.Linear(16, 16),
        )
        quantized(model, x)
        assert model.a.input_quantizer is model.pool.input_quantizer

    def test_module_and_function_share(self, x):
        model = quantized(Net(lambda m, x: (m.a(x), F.conv2d(x, m.b.weight)), a=conv(), b=conv()), x)
        assert model.get_submodule("_call_sites.conv2d_0.input") is model.a.input_quantizer

    def test_query_key_and_value_share(self):
        model = Net(lambda m, x: (m.q(x), m.k(x), m.v(x)), **{name: nn.Linear(32, 32) for name in "qkv"})
        quantized(model, torch.randn(2, 5, 32))
        assert model.q.input_quantizer is model.k.input_quantizer is model.v.input_quantizer

    def test_their_weights_do_not(self):
        model = Net(lambda m, x: (m.q(x), m.k(x), m.v(x)), **{name: nn.Linear(32, 32) for name in "qkv"})
        quantized(model, torch.randn(2, 5, 32))
        assert len({id(layer.weight_quantizer) for layer in (model.q, model.k, model.v)}) == 3

    def test_another_grid_is_not_shared(self, x):
        model = Net(lambda m, x: (m.a(x), m.b(x)), a=conv(), b=conv()).eval()
        recipe = fq.preset("int8") + fq.Rule("b", input=fq.QuantDescriptor(4))
        fq.quantize(model, recipe, example_inputs=x)
        assert [model.a.input_quantizer.num_bits, model.b.input_quantizer.num_bits] == [8, 4]

    def test_different_tensors_do_not_share(self, x):
        model = quantized(Net(lambda m, x: m.b(m.a(x)), a=conv(), b=conv()), x)
        assert model.a.input_quantizer is not model.b.input_quantizer

    def test_a_tensor_that_was_written_to_is_another(self, x):
        def forward(m, x):
            y = x.exp()
            one = m.a(y)
            y.relu_()
            return one, m.b(y)

        model = quantized(Net(forward, a=conv(), b=conv()), x)
        assert model.a.input_quantizer is not model.b.input_quantizer


class TestTiedWeights:
    def test_layers_share_one_weight_quantizer(self):
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        model[2].weight = model[0].weight
        quantized(model, torch.randn(4, 16))
        assert model[0].weight_quantizer is model[2].weight_quantizer

    def test_their_inputs_do_not(self):
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        model[2].weight = model[0].weight
        quantized(model, torch.randn(4, 16))
        assert model[0].input_quantizer is not model[2].input_quantizer

    def test_a_function_on_the_weight_of_a_layer_shares(self):
        model = quantized(Net(lambda m, x: F.linear(m.fc(x), m.fc.weight), fc=nn.Linear(16, 16)), torch.randn(4, 16))
        assert model.get_submodule("_call_sites.linear_0.weight") is model.fc.weight_quantizer

    def test_equal_weights_that_are_not_tied_do_not(self):
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        model[2].load_state_dict(model[0].state_dict())
        quantized(model, torch.randn(4, 16))
        assert model[0].weight_quantizer is not model[2].weight_quantizer

    def test_different_axes_do_not(self):
        # As in an autoencoder: rows are the channels of the one, columns those of the other.
        model = Net(lambda m, x: m.fc(x).relu() @ m.fc.weight, fc=nn.Linear(16, 32))
        fq.quantize(model, fq.preset("int8") + fq.Rule(type="matmul"), example_inputs=torch.randn(4, 16))
        axes = [q.axis for q in (model.fc.weight_quantizer, model.get_submodule("_call_sites.matmul_0.other"))]
        assert axes == [0, 1]


def twice(m, x):
    return m.a(m.a(x) * 10)


class TestModuleCalledTwice:
    def test_every_call_has_its_quantizer(self, x):
        model = quantized(Net(twice, a=conv()), x)
        assert [name for name, _ in model.a.input_quantizer.named_children()] == ["0", "1"]

    def test_every_quantizer_has_the_range_of_its_call(self, x):
        model = Net(twice, a=conv()).eval()
        with torch.no_grad():
            expected = [x.abs().max().item(), (model.a(x) * 10).abs().max().item()]
        quantized(model, x, calibrate=True)
        assert [q.amax.item() for q in model.a.input_quantizer.children()] == pytest.approx(expected, rel=1e-6)

    def test_the_weight_has_one(self, x):
        model = quantized(Net(twice, a=conv()), x)
        assert isinstance(model.a.weight_quantizer, fq.TensorQuantizer)

    def test_two_calls_on_one_tensor_have_one(self, x):
        model = quantized(Net(lambda m, x: (m.a(x), m.a(x)), a=conv()), x)
        assert isinstance(model.a.input_quantizer, fq.TensorQuantizer)

    def test_two_calls_on_parts_of_one_tensor_have_one(self):
        model = Net(lambda m, x: [m.a(part) for part in x.chunk(2, 1)], a=conv())
        assert isinstance(quantized(model, torch.randn(2, 32, 8, 8)).a.input_quantizer, fq.TensorQuantizer)

    def test_a_later_call_shares_with_others_that_read_its_tensor(self, x):
        def forward(m, x):
            y = m.a(x)
            return m.a(y), m.b(y)

        model = quantized(Net(forward, a=conv(), b=conv()), x)
        assert model.a.input_quantizer.get_submodule("1") is model.b.input_quantizer


class Collected(list):
    """Shapes of the tensors that one quantizer collects from."""

    def __init__(self, monkeypatch, quantizer):
        super().__init__()
        original = fq.calib.MaxCalibrator.collect

        def collect(calibrator, tensor):
            if calibrator is getattr(quantizer._calibrator, "_calibrator", None):  # behind a Collector
                self.append(tuple(tensor.shape))
            original(calibrator, tensor)

        monkeypatch.setattr(fq.calib.MaxCalibrator, "collect", collect)


class TestEveryTensorCountsOnce:
    @pytest.fixture
    def collected(self, monkeypatch):
        return lambda quantizer: Collected(monkeypatch, quantizer)

    def run(self, model, collected, quantizer, x):
        found = collected(quantizer(quantized(model, x)))
        fq.calibrate(model, [x], progress=False)
        return found

    def test_of_three_readers(self, collected):
        model = Net(lambda m, x: (m.q(x), m.k(x), m.v(x)), **{name: nn.Linear(32, 32) for name in "qkv"})
        found = self.run(model, collected, lambda m: m.q.input_quantizer, torch.randn(2, 5, 32))
        assert found == [(2, 5, 32)]

    def test_of_a_block_and_its_skip(self, collected, x):
        model = Net(lambda m, x: m.a(x) + x, a=conv())
        assert self.run(model, collected, lambda m: m.a.input_quantizer, x) == [(2, 16, 8, 8)]

    def test_in_every_batch(self, collected, x):
        model = quantized(Net(lambda m, x: m.a(x) + x, a=conv()), x)
        found = collected(model.a.input_quantizer)
        fq.calibrate(model, [x, x + 1, x + 2], progress=False)
        assert found == [(2, 16, 8, 8)] * 3

    def test_a_buffer_that_is_filled_again_counts_in_every_batch(self, x):
        model, buffer = quantized(nn.Sequential(conv()), x), torch.zeros_like(x)
        fq.calibrate(model, (buffer.fill_(value) for value in (1.0, 7.0, 3.0)), progress=False)
        assert model[0].input_quantizer.amax.item() == 7.0

    def test_also_one_that_numpy_fills(self, x):
        model, buffer = quantized(nn.Sequential(conv()), x), torch.zeros_like(x)

        def batches():
            for value in (1.0, 7.0, 3.0):
                buffer.numpy().fill(value)
                yield buffer

        fq.calibrate(model, batches(), progress=False)
        assert model[0].input_quantizer.amax.item() == 7.0

    def test_a_part_and_the_whole_are_two_tensors(self, collected, x):
        found = self.run(joined(JOINS["cat"]), collected, lambda m: m.one.input_quantizer, x)
        assert found == [(2, 16, 8, 8), (2, 16, 8, 8), (2, 32, 8, 8)]

    def test_the_percentile_is_that_of_all_tensors(self):
        # x would weigh three times as much if every reader counted it.
        def forward(m, x):
            y = x.exp()
            return m.q(x), m.k(x), m.v(x), m.both(torch.cat([x, y], 1))

        names = {name: nn.Linear(64, 16) for name in "qkv"}
        model = Net(forward, **names, both=nn.Linear(128, 16))
        x = torch.randn(256, 64)
        quantized(model, x, calibrate=True, method="percentile", percentile=90.0)
        together = np.abs(np.concatenate([x.numpy().ravel(), x.numpy().ravel(), x.exp().numpy().ravel()]))
        # A histogram has at least 2048 bins below the maximum.
        width = float(together.max()) / 2048
        assert model.q.input_quantizer.amax.item() == pytest.approx(np.percentile(together, 90), abs=width)
