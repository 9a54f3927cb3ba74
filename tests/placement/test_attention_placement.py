"""Rules R41 and R42: both products of an attention are quantized where a fused kernel exists, what is inside is not."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fakequant as fq

FUSED = "product of a fused attention (R42)"
FUSED_AT_ONCE = "q, k, v of a fused attention (R42)"
MASK = "the mask depends on the input; no fused kernel (R42)"
SCALED_LATE = "the scale is applied behind the first product; fused kernels want it before the quantizer of q (R42)"
NO_ATTENTION = "a product outside of a fused attention (R42)"
PRODUCTS = tuple(f"matmul_{n}.{operand}" for n in (0, 1) for operand in ("input", "other"))
AT_ONCE = tuple(f"scaled_dot_product_attention_0.{name}" for name in ("query", "key", "value", "softmax"))


class SelfAttention(nn.Module):
    """Projections, heads, and a function of the module, q, k, v and further inputs."""

    def __init__(self, attend, width=32, heads=2, positions=6):
        super().__init__()
        self.attend, self.heads = attend, heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.register_buffer("causal", torch.full((positions, positions), float("-inf")).triu(1))
        self.bias = nn.Parameter(torch.zeros(positions, positions))

    def to_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, *others):
        q, k, v = (self.to_heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.out(self.attend(self, q, k, v, *others).transpose(1, 2).flatten(2))


@pytest.fixture
def x():
    return torch.randn(2, 6, 32)


def edges(model, *inputs, **options):
    return {edge.name: edge for edge in fq.plan(model.eval(), inputs, **options).report.edges}


def reasons(model, *inputs, names=PRODUCTS):
    """Return the reasons of the products' operands; the quantized ones are asserted to be all or none."""
    found = edges(model, *inputs)
    assert len({found[name].descriptor is None for name in names}) == 1
    return {found[name].reason for name in names}


def are_quantized(model, *inputs, names=PRODUCTS):
    found = edges(model, *inputs)
    return all(found[name].descriptor is not None for name in names)


def scaled(q):
    return q * q.shape[-1] ** -0.5


WRITTEN = {
    "no scale": lambda m, q, k, v: torch.softmax(q @ k.transpose(-2, -1), -1) @ v,
    "scale on q": lambda m, q, k, v: torch.softmax(scaled(q) @ k.transpose(-2, -1), -1) @ v,
    "scale on k": lambda m, q, k, v: torch.softmax(q @ scaled(k).transpose(-2, -1), -1) @ v,
    "divided q": lambda m, q, k, v: torch.softmax((q / math.sqrt(16)) @ k.mT, -1) @ v,
    "torch.matmul": lambda m, q, k, v: torch.matmul(F.softmax(torch.matmul(q, k.mT), dim=-1), v),
    "x.softmax": lambda m, q, k, v: q.matmul(k.mT).softmax(-1).matmul(v),
    "dropout": lambda m, q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.1, m.training) @ v,
    "reshaped": lambda m, q, k, v: torch.softmax((q @ k.mT).reshape(-1, 6, 6), -1).reshape(2, 2, 6, 6).contiguous() @ v,
}
MASKED_BY_A_CONSTANT = {
    "buffer": lambda m, q, k, v: torch.softmax(scaled(q) @ k.mT + m.causal, -1) @ v,
    "part of a buffer": lambda m, q, k, v: torch.softmax(scaled(q) @ k.mT + m.causal[:6, :6], -1) @ v,
    "parameter": lambda m, q, k, v: torch.softmax(scaled(q) @ k.mT + m.bias, -1) @ v,
    "computed": lambda m, q, k, v: torch.softmax(scaled(q) @ k.mT + torch.zeros(6, 6).triu(1), -1) @ v,
    "twice": lambda m, q, k, v: torch.softmax(scaled(q) @ k.mT + m.causal + m.bias, -1) @ v,
}


class TestByHand:
    @pytest.mark.parametrize("attend", WRITTEN.values(), ids=WRITTEN)
    def test_all_operands_are_quantized(self, x, attend):
        assert are_quantized(SelfAttention(attend), x)

    @pytest.mark.parametrize("attend", WRITTEN.values(), ids=WRITTEN)
    def test_reason(self, x, attend):
        assert reasons(SelfAttention(attend), x) == {FUSED}

    def test_bmm(self, x):
        def attend(m, q, k, v):
            return torch.bmm(torch.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT), -1), v.flatten(0, 1))

        names = tuple(f"bmm_{n}.{operand}" for n in (0, 1) for operand in ("input", "mat2"))
        model = SelfAttention(lambda *args: attend(*args).unflatten(0, (2, 2)))
        assert are_quantized(model, x, names=names)

    def test_the_softmax_inside_stays_float(self, x):
        edge = edges(SelfAttention(WRITTEN["scale on q"]), x)["softmax_0.input"]
        assert (edge.descriptor, edge.reason) == (None, "stays float inside (R41)")

    def test_the_scale_stays_float(self, x):
        edge = edges(SelfAttention(WRITTEN["scale on q"]), x)["mul_0.input"]
        assert (edge.descriptor, edge.reason) == (None, "pointwise, fused in float (R40)")

    def test_probabilities_have_a_fixed_range(self, x):
        assert edges(SelfAttention(WRITTEN["scale on q"]), x)["matmul_1.input"].descriptor.amax == 1.0

    @pytest.mark.parametrize("name", ["matmul_0.input", "matmul_0.other", "matmul_1.other"])
    def test_q_k_and_v_are_calibrated(self, x, name):
        assert edges(SelfAttention(WRITTEN["scale on q"]), x)[name].descriptor.amax is None

    def test_q_and_k_made_of_one_tensor_have_a_range_each(self):
        # An engine fuses the whole attention; a range in common would be lost accuracy for nothing.
        class Fused(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv = nn.Linear(32, 96)

            def forward(self, x):
                q, k, v = self.qkv(x).chunk(3, -1)
                return torch.softmax(q @ k.mT, -1) @ v

        found = edges(Fused(), torch.randn(2, 6, 32))
        assert [found[name].shares for name in PRODUCTS] == [()] * 4

    @pytest.mark.parametrize(
        "attend",
        [
            lambda m, q, k, v: torch.softmax(q @ k.mT * 0.25, -1) @ v,
            lambda m, q, k, v: torch.softmax(q @ k.mT / 4, -1) @ v,
            lambda m, q, k, v: torch.softmax(0.25 * (q @ k.mT) + m.causal, -1) @ v,
        ],
        ids=["times", "divided by", "times, then masked"],
    )
    def test_a_scale_behind_the_product_keeps_them_float(self, x, attend):
        assert reasons(SelfAttention(attend), x) == {SCALED_LATE}

    @pytest.mark.parametrize(
        "attend",
        [
            pytest.param(lambda m, q, k, v: torch.tanh(q @ k.mT) @ v, id="tanh"),
            pytest.param(lambda m, q, k, v: (q @ k.mT) @ v, id="nothing"),
            pytest.param(lambda m, q, k, v: torch.softmax(torch.tanh(q @ k.mT), -1) @ v, id="tanh, softmax"),
            pytest.param(lambda m, q, k, v: (torch.softmax(q @ k.mT, -1) * 2) @ v, id="softmax, scale"),
        ],
    )
    def test_something_else_between_the_products_keeps_them_float(self, x, attend):
        assert reasons(SelfAttention(attend), x) == {NO_ATTENTION}

    def test_projections_are_quantized_all_the_same(self, x):
        found = edges(SelfAttention(lambda m, q, k, v: torch.tanh(q @ k.mT) @ v), x)
        assert all(found[f"{name}.input"].descriptor is not None for name in ("q", "k", "v", "out"))


class TestMaskByHand:
    @pytest.mark.parametrize("attend", MASKED_BY_A_CONSTANT.values(), ids=MASKED_BY_A_CONSTANT)
    def test_constant(self, x, attend):
        assert reasons(SelfAttention(attend), x) == {FUSED}

    def test_constant_in_front(self, x):
        model = SelfAttention(lambda m, q, k, v: torch.softmax(m.causal + scaled(q) @ k.mT, -1) @ v)
        assert reasons(model, x) == {FUSED}

    @pytest.mark.parametrize(
        "attend",
        [
            pytest.param(
                lambda m, q, k, v: torch.softmax((q @ k.mT).masked_fill(m.causal != 0, float("-inf")), -1) @ v,
                id="masked_fill",
            ),
            pytest.param(
                lambda m, q, k, v: torch.softmax(torch.where(m.causal == 0, q @ k.mT, torch.tensor(-1e9)), -1) @ v,
                id="where",
            ),
        ],
    )
    def test_constant_that_is_filled_in(self, x, attend):
        assert reasons(SelfAttention(attend), x) == {FUSED}

    @pytest.mark.parametrize(
        "attend",
        [
            pytest.param(lambda m, q, k, v, mask: torch.softmax(scaled(q) @ k.mT + mask, -1) @ v, id="add"),
            pytest.param(lambda m, q, k, v, mask: torch.softmax(q @ k.mT + m.causal + mask, -1) @ v, id="both"),
            pytest.param(lambda m, q, k, v, mask: torch.softmax(q @ k.mT + (mask - 1) * 9, -1) @ v, id="computed"),
            pytest.param(
                lambda m, q, k, v, mask: torch.softmax((q @ k.mT).masked_fill(mask == 0, -1e9), -1) @ v, id="filled"
            ),
        ],
    )
    def test_of_the_input_keeps_the_products_float(self, x, attend):
        assert reasons(SelfAttention(attend), x, torch.ones(2, 1, 1, 6)) == {MASK}

    def test_of_the_input_in_front_keeps_the_products_float(self, x):
        model = SelfAttention(lambda m, q, k, v, mask: torch.softmax(mask + q @ k.mT, -1) @ v)
        assert not are_quantized(model, x, torch.zeros(2, 1, 1, 6))

    def test_of_integers_from_the_input_keeps_the_products_float(self, x):
        model = SelfAttention(lambda m, q, k, v, mask: torch.softmax(q @ k.mT + mask, -1) @ v)
        assert reasons(model, x, torch.zeros(2, 1, 1, 6, dtype=torch.long)) == {MASK}


class TestSizes:
    @pytest.mark.parametrize(
        ("positions", "reason"), [(512, FUSED), (513, "513 positions; the fused kernel ends at 512 (R42)")]
    )
    def test_positions(self, positions, reason):
        model = SelfAttention(WRITTEN["scale on q"])
        assert reasons(model, torch.randn(1, positions, 32)) == {reason}

    @pytest.mark.parametrize(("size", "reason"), [(16, FUSED), (15, "head size 15, below 16 (R42)")])
    def test_head(self, size, reason):
        model = SelfAttention(WRITTEN["scale on q"], width=2 * size)
        assert reasons(model, torch.randn(1, 6, 2 * size)) == {reason}

    @pytest.mark.parametrize(("positions", "quantized"), [(512, True), (513, False)])
    def test_positions_of_the_keys_alone(self, positions, quantized):
        model = Cross()
        assert are_quantized(model, torch.randn(1, 6, 32), torch.randn(1, positions, 32)) is quantized

    @pytest.mark.parametrize(("positions", "quantized"), [(512, True), (513, False)])
    def test_positions_at_once(self, positions, quantized):
        model = SelfAttention(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v))
        assert are_quantized(model, torch.randn(1, positions, 32), names=AT_ONCE) is quantized

    @pytest.mark.parametrize(("size", "quantized"), [(16, True), (15, False)])
    def test_head_at_once(self, size, quantized):
        model = SelfAttention(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v), width=2 * size)
        assert are_quantized(model, torch.randn(1, 6, 2 * size), names=AT_ONCE) is quantized


class Cross(nn.Module):
    """Queries from one sequence, keys and values from another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x, memory):
        return torch.softmax(self.q(x) @ self.k(memory).mT, -1) @ self.v(memory)


class TestAtOnce:
    @pytest.mark.parametrize(
        "attend",
        [
            pytest.param(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v), id="plain"),
            pytest.param(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), id="causal"),
            pytest.param(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5), id="scale"),
            pytest.param(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, m.causal), id="constant mask"),
            pytest.param(
                lambda m, q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m.causal == 0),
                id="constant bool mask",
            ),
        ],
    )
    def test_is_quantized(self, x, attend):
        assert are_quantized(SelfAttention(attend), x, names=AT_ONCE)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
    def test_a_mask_of_the_input_keeps_it_float(self, x, dtype):
        model = SelfAttention(lambda m, q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask))
        assert reasons(model, x, torch.ones(2, 1, 6, 6, dtype=dtype), names=AT_ONCE) == {MASK}

    def test_probabilities_have_a_fixed_range(self, x):
        model = SelfAttention(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v))
        found = edges(model, x)
        assert [found[name].descriptor.amax for name in AT_ONCE] == [None, None, None, 1.0]

    def test_reasons(self, x):
        model = SelfAttention(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v))
        assert reasons(model, x, names=AT_ONCE) == {FUSED_AT_ONCE, "probabilities, at most 1 (R42)"}


@pytest.mark.parametrize(
    ("attend", "softmax"),
    [
        (WRITTEN["scale on q"], "_call_sites.matmul_1.input"),
        (
            lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
            "_call_sites.scaled_dot_product_attention_0.softmax",
        ),
    ],
    ids=["by hand", "at once"],
)
class TestQuantizedModel:
    def test_calibration_leaves_the_range_of_the_probabilities(self, x, attend, softmax):
        model = SelfAttention(attend).eval()
        fq.quantize(model, example_inputs=x)
        fq.calibrate(model, [x], progress=False)
        assert model.get_submodule(softmax).amax.item() == 1.0

    def test_output(self, x, attend, softmax):
        model = SelfAttention(attend).eval()
        fq.quantize(model, example_inputs=x)
        fq.calibrate(model, [x], progress=False)
        q, k, v = (model.to_heads(layer(x)) for layer in (model.q, model.k, model.v))

        def rounded(tensor, amax=None):
            scale = (tensor.abs().max() if amax is None else torch.tensor(amax)) / 127
            return (tensor / scale).round().clamp(-128, 127) * scale

        # Its float projections gave the ranges, its quantized ones the values: only nearly the same.
        expected = rounded(torch.softmax(rounded(q * 0.25) @ rounded(k).mT, -1), 1.0) @ rounded(v)
        torch.testing.assert_close(model(x), model.out(expected.transpose(1, 2).flatten(2)), rtol=0, atol=0.02)


class TestTorchModules:
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_multihead_attention_that_returns_weights(self, x, batch_first):
        found = edges(nn.MultiheadAttention(32, 2, batch_first=batch_first), x, x, x)
        quantized = {name for name, edge in found.items() if edge.descriptor is not None}
        layers = {f"{layer}.{operand}" for layer in ("linear_0", "out_proj") for operand in ("input", "weight")}
        assert quantized == layers | set(PRODUCTS)

    def test_its_probabilities_have_a_fixed_range(self, x):
        found = edges(nn.MultiheadAttention(32, 2, batch_first=True), x, x, x)
        assert found["matmul_1.input"].descriptor.amax == 1.0

    def test_multihead_attention_with_a_mask_of_the_input(self, x):
        attention = nn.MultiheadAttention(32, 2, batch_first=True)
        found = edges(attention, x, x, x, torch.zeros(2, 6, dtype=torch.bool))
        assert {found[name].reason for name in PRODUCTS} == {MASK}

    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    class TestEncoderLayer:
        def found(self, x, norm_first, activation):
            layer = nn.TransformerEncoderLayer(32, 2, 64, 0.1, activation, batch_first=True, norm_first=norm_first)
            return edges(layer, x)

        def test_layers_and_products_are_quantized_and_nothing_else(self, x, norm_first, activation):
            found = self.found(x, norm_first, activation)
            layers = ("self_attn.linear_0", "self_attn.out_proj", "linear1", "linear2")
            expected = {f"{layer}.{operand}" for layer in layers for operand in ("input", "weight")}
            expected |= {f"self_attn.{name}" for name in AT_ONCE}
            assert {name for name, edge in found.items() if edge.descriptor is not None} == expected

        def test_norms_are_in_the_report_and_float(self, x, norm_first, activation):
            found = self.found(x, norm_first, activation)
            reasons = [found[f"norm{n}.layer_norm_0.input"].reason for n in (1, 2)]
            assert reasons == ["no integer kernel"] * 2

        def test_the_activation_is_in_the_report_and_float(self, x, norm_first, activation):
            edge = self.found(x, norm_first, activation)[f"{activation}_0.input"]
            assert (edge.descriptor, edge.reason) == (None, "fused into what is before it, or float (R31, R40)")

        def test_both_sums_are_float(self, x, norm_first, activation):
            found = self.found(x, norm_first, activation)
            assert not any(edge.descriptor for name, edge in found.items() if name.startswith("add"))

    def test_a_constant_mask_of_an_encoder_layer_is_fused(self, x):
        class Causal(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
                self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6))

            def forward(self, x):
                return self.layer(x, self.mask, is_causal=True)

        assert are_quantized(Causal(), x, names=tuple(f"layer.self_attn.{name}" for name in AT_ONCE))

    def test_every_layer_of_an_encoder(self, x):
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2, enable_nested_tensor=False
        )
        names = tuple(f"layers.{n}.self_attn.{name}" for n in (0, 1) for name in AT_ONCE)
        assert are_quantized(encoder, x, names=names)
