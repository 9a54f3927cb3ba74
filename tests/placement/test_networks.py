"""The edges that TensorRT's placement picks in networks that people know, by name."""

import pytest
import torch
from torch import nn

import fakequant as fq


@pytest.fixture
def planned(torchvision_models):
    def plan(name, size=64, **arguments):
        model = getattr(torchvision_models, name)(weights=None, **arguments)
        return {edge.name: edge for edge in fq.plan(model, torch.rand(2, 3, size, size)).report.edges}

    return plan


def quantized(edges):
    return {name for name, edge in edges.items() if edge.descriptor is not None}


def layers(*names):
    return {f"{name}.{operand}" for name in names for operand in ("input", "weight")}


def blocks(counts):
    return [(stage, block) for stage, count in enumerate(counts, start=1) for block in range(count)]


@pytest.mark.parametrize(
    ("name", "counts", "convs", "downsampled"),
    [("resnet18", (2, 2, 2, 2), 2, {2, 3, 4}), ("resnet50", (3, 4, 6, 3), 3, {1, 2, 3, 4})],
)
class TestResNet:
    def test_layers_skips_and_the_last_pool_are_quantized_and_nothing_else(
        self, planned, name, counts, convs, downsampled
    ):
        expected = layers("conv1", "fc") | {"avgpool.input"}
        for stage, block in blocks(counts):
            expected |= layers(*(f"layer{stage}.{block}.conv{i}" for i in range(1, convs + 1)))
            expected |= {f"layer{stage}.{block}.add_0.other"}
        expected |= layers(*(f"layer{stage}.0.downsample.0" for stage in downsampled))
        assert quantized(planned(name)) == expected

    def test_the_branch_of_the_block_stays_float(self, planned, name, counts, convs, downsampled):
        edges = planned(name)
        for stage, block in blocks(counts):
            edge = edges[f"layer{stage}.{block}.add_0.input"]
            assert edge.descriptor is None
            assert "R33" in edge.reason

    def test_a_skip_shares_with_the_input_of_the_block(self, planned, name, counts, convs, downsampled):
        edges = planned(name)
        for stage, block in blocks(counts):
            is_the_input = block > 0 or stage not in downsampled
            shares = (f"layer{stage}.{block}.conv1.input",) if is_the_input else ()
            assert edges[f"layer{stage}.{block}.add_0.other"].shares == shares

    def test_a_downsampling_branch_shares_with_the_main_one(self, planned, name, counts, convs, downsampled):
        edges = planned(name)
        for stage in downsampled:
            assert edges[f"layer{stage}.0.downsample.0.input"].shares == (f"layer{stage}.0.conv1.input",)


class TestMobileNetV2:
    residual = (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)

    def test_edges(self, planned):
        expected = layers("features.0.0", "features.1.conv.0.0", "features.1.conv.1", "features.18.0", "classifier.1")
        for block in range(2, 18):
            expected |= layers(*(f"features.{block}.conv.{part}" for part in ("0.0", "1.0", "2")))
        expected |= {f"features.{block}.add_0.input" for block in self.residual}
        expected |= {"adaptive_avg_pool2d_0.input"}
        assert quantized(planned("mobilenet_v2")) == expected

    @pytest.mark.parametrize("block", residual)
    def test_a_skip_shares_with_the_input_of_the_block(self, planned, block):
        edges = planned("mobilenet_v2")
        assert edges[f"features.{block}.add_0.input"].shares == (f"features.{block}.conv.0.0.input",)


class TestDenseNet121:
    def test_convolutions_behind_the_norms_are_quantized_and_no_cat_or_transition_pool(self, planned):
        edges = planned("densenet121")
        expected = layers("features.conv0", "classifier") | {"adaptive_avg_pool2d_0.input"}
        for block, count in enumerate((6, 12, 24, 16), start=1):
            for layer in range(1, count + 1):
                prefix = f"features.denseblock{block}.denselayer{layer}"
                expected |= layers(f"{prefix}.conv1", f"{prefix}.conv2")
            if block < 4:
                expected |= layers(f"features.transition{block}.conv")
        assert quantized(edges) == expected
        assert "R35" in edges["features.transition1.pool.input"].reason

    def test_no_two_layers_share(self, planned):
        # Every convolution reads its own norm and activation of the concatenation.
        assert not any(edge.shares for edge in planned("densenet121").values())


class Conv(nn.Sequential):
    def __init__(self, inputs, outputs, kernel=1, stride=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class Bottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.cv1, self.cv2 = Conv(channels, channels, 3), Conv(channels, channels, 3)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """The block of YOLOv8: halves of a convolution, a bottleneck, everything concatenated."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.cv1, self.cv2 = Conv(inputs, outputs), Conv(outputs + outputs // 2, outputs)
        self.m = nn.ModuleList([Bottleneck(outputs // 2)])

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Pooling(nn.Module):
    """SPPF: a chain of max pools, concatenated."""

    def __init__(self, channels):
        super().__init__()
        self.cv1, self.cv2 = Conv(channels, channels // 2), Conv(channels * 2, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        y = [self.cv1(x)]
        y.extend(self.pool(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Neck(nn.Module):
    """Two levels: the coarse one is pooled, enlarged, joined with the fine one, and both go to a head."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = Conv(3, 32, 3, 2), Conv(32, 64, 3, 2)
        self.sppf, self.up, self.c2f = Pooling(64), nn.Upsample(scale_factor=2, mode="nearest"), C2f(96, 32)
        self.head_fine, self.head_coarse = nn.Conv2d(32, 24, 1), nn.Conv2d(64, 24, 1)

    def forward(self, x):
        fine = self.fine(x)
        coarse = self.sppf(self.coarse(fine))
        joined = self.c2f(torch.cat([self.up(coarse), fine], 1))
        return self.head_fine(joined), self.head_coarse(coarse)


class TestYoloNeck:
    @pytest.fixture
    def edges(self):
        return {edge.name: edge for edge in fq.plan(Neck(), torch.rand(1, 3, 32, 32)).report.edges}

    def test_convolutions_and_the_skip_are_quantized_and_no_cat_upsample_pool_or_silu(self, edges):
        convs = ["fine.0", "coarse.0", "sppf.cv1.0", "sppf.cv2.0", "c2f.cv1.0", "c2f.m.0.cv1.0", "c2f.m.0.cv2.0"]
        expected = layers(*convs, "c2f.cv2.0", "head_fine", "head_coarse") | {"c2f.m.0.add_0.input"}
        assert quantized(edges) == expected

    @pytest.mark.parametrize(
        ("edge", "first"),
        [
            ("c2f.cv1.0.input", "coarse.0.input"),  # the cat of the two levels holds what the coarse one reads
            ("head_coarse.input", "coarse.0.input"),  # it was enlarged into that cat
            ("c2f.m.0.add_0.input", "c2f.m.0.cv1.0.input"),
            ("c2f.cv2.0.input", "c2f.m.0.cv1.0.input"),  # a half of the convolution, concatenated again
        ],
    )
    def test_what_is_moved_joined_or_enlarged_has_one_range(self, edges, edge, first):
        assert edges[edge].shares == (first,)

    @pytest.mark.parametrize("edge", ["head_fine.input", "sppf.cv2.0.input", "c2f.m.0.cv2.0.input"])
    def test_what_a_convolution_made_has_its_own(self, edges, edge):
        assert edges[edge].shares == ()


class TestVisionTransformer:
    def test_edges(self, planned):
        edges = planned("vit_b_16", image_size=64)
        expected = layers("conv_proj", "heads.head")
        for index in range(12):
            prefix = f"encoder.layers.encoder_layer_{index}"
            attention = f"{prefix}.self_attention"
            expected |= layers(f"{attention}.linear_0", f"{attention}.out_proj", f"{prefix}.mlp.0", f"{prefix}.mlp.3")
            expected |= {
                f"{attention}.scaled_dot_product_attention_0.{operand}"
                for operand in ("query", "key", "value", "softmax")
            }
        assert quantized(edges) == expected

    def test_probabilities_have_a_fixed_range(self, planned):
        edges = planned("vit_b_16", image_size=64)
        name = "encoder.layers.encoder_layer_0.self_attention.scaled_dot_product_attention_0.softmax"
        assert edges[name].descriptor.amax == 1.0

    def test_the_products_stay_float_beyond_512_positions(self, planned):
        edges = planned("vit_b_16", size=368, image_size=368)  # 23 x 23 patches and the class token
        name = "encoder.layers.encoder_layer_0.self_attention.scaled_dot_product_attention_0.query"
        assert edges[name].descriptor is None
        assert "530 positions" in edges[name].reason


class TestBert:
    @pytest.fixture
    def edges(self):
        import transformers

        config = transformers.BertConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        model = transformers.BertModel(config)
        ids = torch.randint(0, 100, (2, 12))
        mask = torch.ones_like(ids)
        mask[1, 8:] = 0
        found = fq.plan(model, {"input_ids": ids, "attention_mask": mask}).report.edges
        return {edge.name: edge for edge in found}

    def test_linear_layers_are_quantized_and_nothing_else(self, edges):
        expected = layers("pooler.dense")
        for index in range(2):
            prefix = f"encoder.layer.{index}"
            expected |= layers(*(f"{prefix}.attention.self.{name}" for name in ("query", "key", "value")))
            expected |= layers(
                f"{prefix}.attention.output.dense", f"{prefix}.intermediate.dense", f"{prefix}.output.dense"
            )
        assert quantized(edges) == expected

    @pytest.mark.parametrize("name", ["key", "value"])
    def test_query_key_and_value_share_the_quantizer_of_their_input(self, edges, name):
        prefix = "encoder.layer.1.attention.self"
        assert edges[f"{prefix}.{name}.input"].shares == (f"{prefix}.query.input",)

    def test_the_products_stay_float_because_of_the_mask(self, edges):
        found = [edge for name, edge in edges.items() if "scaled_dot_product_attention" in name]
        assert found
        assert all(edge.descriptor is None and "mask depends on the input" in edge.reason for edge in found)
