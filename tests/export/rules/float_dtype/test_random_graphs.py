"""Whatever the graph: valid, without Casts beside Q and DQ, and every pair with one scale."""

import numpy as np
import pytest

from fakequant.export.graph import constant_of


def random_graph(seed: int) -> str:
    """Return a graph of Q/DQ pairs and ops of all kinds, wired at random."""
    rng = np.random.default_rng(seed)
    lines, values = [], ["x"]
    for index in range(14):
        kind = rng.choice(["pair", "unary", "auto", "binary", "product"], p=[0.35, 0.25, 0.15, 0.15, 0.1])
        one, other = rng.choice(values[-4:]), rng.choice(values[-4:])
        name = f"v{index}"
        scale = rng.choice(["s", "s", "huge", "tiny"])
        lines.append(
            {
                "pair": f"q{index} = QuantizeLinear({one}, {scale}, z) {name} = DequantizeLinear(q{index}, {scale}, z)",
                "unary": f"{name} = {rng.choice(['Relu', 'Tanh', 'Neg'])}({one})",
                "auto": f"a{index} = Tanh({one}) {name} = Exp(a{index})",
                "binary": f"a{index} = Add({one}, {other}) {name} = Mul(a{index}, k)",
                "product": f"{name} = MatMul({one}, w)",
            }[kind]
        )
        values.append(name)
    return (
        f"agraph (float[2, 2] x) => (float[2, 2] {values[-1]}, float[2, 2] y) <float s = {{0.05}}, "
        "float huge = {600}, float tiny = {3e-6}, int8 z = {0}, float k = {0.5}, "
        "float[2, 2] w = {0.5, 0.25, -0.5, 0.125}> "
        f"{{ {' '.join(lines)} y = Sigmoid({values[-2]}) }}"
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_are_typed_and_compute(run, half, casts_beside_pairs, seed):
    text = random_graph(seed)
    model, _ = half(text)
    assert casts_beside_pairs(model) == []
    pairs = [node for node in model.graph if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    for node in (node for node in pairs if node.op_type == "QuantizeLinear"):
        scales = {float(constant_of(n.inputs[1])) for n in (node, *node.outputs[0].consumers())}
        assert len(scales) == 1
    assert all(constant_of(node.inputs[1]) > 0 for node in pairs)
    outputs = run(model, **{model.graph.inputs[0].name: np.full((2, 2), 0.3, model.graph.inputs[0].dtype.numpy())})
    assert all(np.isfinite(array).all() for array in outputs)
