import numpy as np
import pytest

from fakequant.export.rules.norm_sums import NormSums

TEXT = """
agraph (float[2, 4] a, float[2, 4] b) => (float[2, 4] y)
<float[4] s = {1.0, 2.0, 3.0, 4.0}>
{ c = Add(a, b) n = LayerNormalization(c, s) y = Add(n, b) }
"""


@pytest.fixture
def feeds():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((2, 4), np.float32) for name in "ab"}


def test_only_the_add_in_front_of_the_norm_becomes_a_sum(parse, ops):
    model = parse(TEXT)
    assert NormSums()(model).modified
    assert ops(model) == ["Sum", "LayerNormalization", "Add"]


def test_the_graph_computes_the_same(parse, run, feeds):
    model = parse(TEXT)
    before = run(model, **feeds)
    NormSums()(model)
    np.testing.assert_array_equal(run(model, **feeds), before)


def test_an_add_that_several_norms_read(parse, ops):
    model = parse(TEXT.replace("y = Add(n, b)", "m = LayerNormalization(c, s) y = Add(n, m)"))
    NormSums()(model)
    assert ops(model) == ["Sum", "LayerNormalization", "LayerNormalization", "Add"]


def test_a_graph_without_norms_stays(parse):
    model = parse("agraph (float[2] a) => (float[2] y) { y = Add(a, a) }")
    assert not NormSums()(model).modified
