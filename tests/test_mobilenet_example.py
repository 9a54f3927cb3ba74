"""examples/mobilenet_table.py: what each way of quantizing loses where the ranges of channels are far apart."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

EXAMPLE = Path(__file__).parent.parent / "examples" / "mobilenet_table.py"
pytestmark = pytest.mark.skipif(
    not EXAMPLE.is_file(), reason="the tests run against an installed wheel, not a checkout"
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mobilenet_table", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def network(example) -> nn.Module:
    """Not trained, but every batch norm has statistics and weights of its own."""
    model = example.MobileDigitNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_()
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2)
    return model.eval()


def test_the_network_computes_the_same_with_its_ranges_apart(example, network):
    x = torch.rand(4, 1, 8, 8)
    before = network(x)
    example.move_ranges_apart(network, 4, torch.Generator().manual_seed(0))
    assert (network(x) - before).abs().max() < 1e-4


def test_ranges_are_apart(example, network):
    weights = [block.depthwise[0].weight for block in network.modules() if isinstance(block, example.InvertedResidual)]
    before = [weight.detach().clone() for weight in weights]
    example.move_ranges_apart(network, 4, torch.Generator().manual_seed(0))
    for weight, old in zip(weights, before, strict=True):
        factor = (weight / old).amax((1, 2, 3)).log2()
        assert (factor.min(), factor.max()) == (-4, 4)


@pytest.fixture(scope="module")
def table(example) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums, and so the accuracies, do not depend on the machine's cores
    yield example.main()
    torch.set_num_threads(threads)


@pytest.mark.slow
class TestTable:
    def test_the_float_network_is_accurate(self, table):
        assert table["float"] > 98

    def test_per_tensor_weights_lose_much(self, table):
        assert table["int8 PTQ, per-tensor weights, max"] < table["float"] - 10

    @pytest.mark.parametrize("method", ["percentile", "entropy"])
    def test_per_channel_weights_and_histograms_recover_most(self, table, method):
        assert table[f"int8 PTQ, per-channel weights, {method}"] > table["float"] - 3

    def test_histograms_are_better_than_the_maximum(self, table):
        least = min(table[f"int8 PTQ, per-channel weights, {method}"] for method in ("percentile", "entropy"))
        assert least > table["int8 PTQ, per-channel weights, max"] > table["int8 PTQ, per-tensor weights, max"]

    def test_fine_tuning_recovers_the_rest(self, table):
        assert table["int8 QAT, 10 epochs from percentile"] > table["float"] - 0.5
