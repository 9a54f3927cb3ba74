"""On random Q/DQ graphs, an op has a reason exactly if ONNX Runtime runs it in floats."""

import random
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fakequant.export.inspect_onnx import inspect_onnx
from fakequant.export.kernels import KERNELS
from fakequant.export.load import load_model
from fakequant.export.quantized_edges import merge_equal_quantizers
from fakequant.export.reasons import reasons_for

INITIALIZERS = """
    float s = {0.05}, float s2 = {0.1}, float s6 = {0.0235294}, uint8 u = {128}, uint8 z = {0}, int8 i = {0},
    int8 m = {-128}, float[2] ws = {0.1, 0.2}, int8[2] wz = {0, 0}, float[2] b = {0.1, 0.2}, float[1, 2] row = {1, 2},
    float[1] one = {1}, int8[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2, 2, 1, 1] wf = {1, 2, 3, 4},
    int8[2, 2] v = {1, 2, 3, 4}, float[2, 2] vf = {1, 2, 3, 4}, int32[2] b32 = {3, 4}, float[2] bs = {0.005, 0.01},
    int32[2] bz = {0, 0}, float zero = {0}, float six = {6}, int64[1] first = {0}
"""
DECLARED = {"image": "float[1, 2, 4, 4] x", "rows": "float[3, 2] x"}
OUTPUT = {"image": "float[A, B, C, D] y", "rows": "float[A, B] y"}
GRIDS = ["s, u", "s, u", "s, i", "s, i", "s, z", "s2, u", "s6, z", "s, m"]
W = "{o}w = DequantizeLinear<axis = 0>(w, ws, wz) "
V = "{o}v = DequantizeLinear<axis = 1>(v, ws, wz) "
VT = "{o}v = DequantizeLinear<axis = 0>(v, ws, wz) "

# {o} is the output of an op, {a} and {c} are what it reads.
OPS = {
    "image": [
        W + "{o} = Conv({a}, {o}w, b)",
        W + "{o} = Conv({a}, {o}w)",
        "{o} = Conv({a}, wf, b)",
        W + "{o}p = Conv({a}, {o}w, b) {o} = Relu({o}p)",
        W + "{o}p = Conv({a}, {o}w) {o} = Clip({o}p, zero, six)",
        W + "{o}p = Conv({a}, {o}w) {o} = MaxPool<kernel_shape = [1, 1]>({o}p)",
        "{o} = Add({a}, {c})",
        "{o} = Mul({a}, {c})",
        "{o} = MaxPool<kernel_shape = [1, 1]>({a})",
        "{o} = AveragePool<kernel_shape = [1, 1]>({a})",
        "{o} = Softmax({a})",
        "{o} = Sigmoid({a})",
        "{o}p = Squeeze({a}, first) {o} = Unsqueeze({o}p, first)",
        "{o} = Relu({a})",
        "{o} = Tanh({a})",
    ],
    "rows": [
        V + "{o} = MatMul({a}, {o}v)",
        "{o} = MatMul({a}, vf)",
        V + "{o}p = MatMul({a}, {o}v) {o} = Add({o}p, b)",
        V + "{o}p = MatMul({a}, {o}v) {o} = Add({o}p, row)",
        VT + "{o} = Gemm<transB = 1>({a}, {o}v)",
        VT + "{o} = Gemm<transB = 1>({a}, {o}v, b)",
        VT + "{o} = Gemm<transB = 1>({a}, {o}v, one)",
        VT + "{o} = Gemm<transB = 1, alpha = 0.5>({a}, {o}v, b)",
        VT + "{o}b = DequantizeLinear<axis = 0>(b32, bs, bz) {o} = Gemm<transB = 1>({a}, {o}v, {o}b)",
        "{o} = Add({a}, {c})",
        "{o} = Mul({a}, {c})",
        "{o} = Softmax({a})",
        "{o} = Relu({a})",
        "{o} = Transpose<perm = [0, 1]>({a})",
    ],
}


def random_graph(kind: str, seed: int) -> str:
    """Return ONNX text: a chain of ops with short cuts, Q and DQ nearly everywhere, mostly on one grid."""
    chance = random.Random(seed)
    body: list[str] = []
    floats, dequantized = ["x"], []
    usual = chance.choice(GRIDS)

    def quantize(value: str) -> str:
        grid, name = usual if chance.random() < 0.7 else chance.choice(GRIDS), f"d{len(body)}"
        body.append(f"{name}q = QuantizeLinear({value}, {grid}) {name} = DequantizeLinear({name}q, {grid})")
        dequantized.append(name)
        return name

    def read() -> str:
        if dequantized and chance.random() < 0.8:
            return chance.choice([dequantized[-1], dequantized[-1], *dequantized])
        value = chance.choice([floats[-1], *floats])
        return quantize(value) if chance.random() < 0.8 else value

    for _ in range(chance.randint(2, 6)):
        a, c, output = read(), read(), f"o{len(body)}"
        body.append(chance.choice(OPS[kind]).format(a=a, c=c, o=output))
        if chance.random() < 0.75:
            quantize(output)
        if chance.random() < 0.4:
            floats.append(output)
    body.append(
        f"y = {chance.choice(['Relu', 'Tanh'])}({chance.choice([output, dequantized[-1] if dequantized else 'x'])})"
    )
    return " ".join(body)


def write(path: Path, kind: str, body: str) -> None:
    text = f"agraph ({DECLARED[kind]}) => ({OUTPUT[kind]}) <{INITIALIZERS}> {{ {body} }}"
    # Opset 20: from 21 on, onnxruntime 1.31.1 cannot load an int8 DQ in front of a Transpose or Squeeze.
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}'))
    RemoveUnusedNodesPass()(model)  # onnxruntime would count what nothing reads
    merge_equal_quantizers(model.graph)
    ir.save(model, path)


@pytest.mark.parametrize("kind", ["image", "rows"])
def test_reasons_tell_what_runs_in_floats(tmp_path, kind):
    found = {True: 0, False: 0}
    for seed in range(60):
        body = random_graph(kind, seed)
        write(tmp_path / "m.onnx", kind, body)
        nodes = [node for node in load_model(tmp_path / "m.onnx").graph if node.op_type in KERNELS]
        for op, node in zip(inspect_onnx(tmp_path / "m.onnx").ops, nodes, strict=True):
            if op.has_qdq and op.kernel != "folded":
                found[op.is_integer] += 1
                assert bool(reasons_for(node)) != op.is_integer, f"seed {seed}: {op} in {body}"
    assert min(found.values()) >= 30, found
