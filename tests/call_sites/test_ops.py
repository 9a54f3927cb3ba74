"""Which op a function of torch is, whatever way it is written, and where its operands stand in a call."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fakequant.call_sites import KIND_OF, op_of
from fakequant.call_sites.ops import IN_PLACE, op_named, operands, with_operand


class Calls(TorchFunctionMode):
    """Writes down what torch hands to a mode."""

    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def functions_of(spelling):
    torch.manual_seed(0)
    x, y = torch.rand(2, 4, 6, 6) + 0.5, torch.rand(2, 4, 6, 6) + 0.5
    with Calls() as calls:
        spelling(x, y)
    return calls.functions


def augmented(sign):
    def spelling(x, y):
        names = {"x": x, "y": y}
        exec(f"x {sign} y", {}, names)

    spelling.__name__ = sign
    return spelling


def spelled(kind, **spellings):
    return [pytest.param(kind, spelling, id=f"{kind}-{name}") for name, spelling in spellings.items()]


ARITHMETIC = [
    *spelled(
        "add",
        plus=lambda x, y: x + y,
        number=lambda x, y: x + 1,
        reflected=lambda x, y: 1 + x,
        augmented=augmented("+="),
        torch=lambda x, y: torch.add(x, y),
        alpha=lambda x, y: torch.add(x, y, alpha=2),
        keyword=lambda x, y: torch.add(input=x, other=y),
        method=lambda x, y: x.add(y),
        in_place=lambda x, y: x.add_(y),
        unbound=lambda x, y: Tensor.add(x, y),
        dunder=lambda x, y: x.__add__(y),
        python=operator.add,
        python_in_place=operator.iadd,
        out=lambda x, y: torch.add(x, y, out=torch.empty(0)),
    ),
    *spelled(
        "sub",
        minus=lambda x, y: x - y,
        augmented=augmented("-="),
        torch=torch.sub,
        long=torch.subtract,
        method=lambda x, y: x.sub(y),
        long_method=lambda x, y: x.subtract(y),
        in_place=lambda x, y: x.sub_(y),
        long_in_place=lambda x, y: x.subtract_(y),
        python=operator.sub,
        python_in_place=operator.isub,
    ),
    *spelled(
        "mul",
        times=lambda x, y: x * y,
        reflected=lambda x, y: 2 * x,
        augmented=augmented("*="),
        torch=torch.mul,
        long=torch.multiply,
        method=lambda x, y: x.mul(y),
        in_place=lambda x, y: x.mul_(y),
        long_in_place=lambda x, y: x.multiply_(y),
        python=operator.mul,
        python_in_place=operator.imul,
    ),
    *spelled(
        "div",
        slash=lambda x, y: x / y,
        augmented=augmented("/="),
        torch=torch.div,
        long=torch.divide,
        true=torch.true_divide,
        method=lambda x, y: x.div(y),
        in_place=lambda x, y: x.div_(y),
        true_in_place=lambda x, y: x.true_divide_(y),
        python=operator.truediv,
        python_in_place=operator.itruediv,
    ),
]
PRODUCTS = [
    *spelled(
        "matmul",
        sign=lambda x, y: x @ y,
        torch=torch.matmul,
        method=lambda x, y: x.matmul(y),
        dunder=lambda x, y: x.__matmul__(y),
        python=operator.matmul,
        augmented=augmented("@="),
    ),
    *spelled("bmm", torch=lambda x, y: torch.bmm(x[0], y[0]), method=lambda x, y: x[0].bmm(y[0])),
    *spelled("mm", torch=lambda x, y: torch.mm(x[0, 0], y[0, 0]), method=lambda x, y: x[0, 0].mm(y[0, 0])),
    *spelled("addmm", torch=lambda x, y: torch.addmm(x[0, 0], x[0, 0], y[0, 0])),
    *spelled("baddbmm", method=lambda x, y: x[0].baddbmm(x[0], y[0])),
    *spelled(
        "einsum",
        plain=lambda x, y: torch.einsum("nchw,nchw->nc", x, y),
        list=lambda x, y: torch.einsum("nchw,nchw->nc", [x, y]),
        sublists=lambda x, y: torch.einsum(x, [0, 1, 2, 3], y, [0, 1, 2, 3], [0, 1]),
    ),
    *spelled("linear", F=lambda x, y: F.linear(x, y[0, 0]), module=lambda x, y: nn.Linear(6, 3)(x)),
    *spelled(
        "conv2d",
        F=lambda x, y: F.conv2d(x, y),
        torch=lambda x, y: torch.conv2d(x, y),
        module=lambda x, y: nn.Conv2d(4, 2, 3)(x),
    ),
    *spelled("conv1d", F=lambda x, y: F.conv1d(x[0], y[0])),
    *spelled("conv_transpose2d", F=lambda x, y: F.conv_transpose2d(x, y[0, :, :2, :2].unsqueeze(1).repeat(1, 2, 1, 1))),
    *spelled("scaled_dot_product_attention", F=lambda x, y: F.scaled_dot_product_attention(x, y, y)),
]
MOVES = [
    *spelled(
        "cat",
        cat=lambda x, y: torch.cat([x, y]),
        concat=lambda x, y: torch.concat((x, y), 1),
        concatenate=lambda x, y: torch.concatenate([x, y], dim=1),
        keyword=lambda x, y: torch.cat(tensors=[x, y]),
    ),
    *spelled("stack", torch=lambda x, y: torch.stack([x, y])),
    *spelled("pad", F=lambda x, y: F.pad(x, (1, 1)), module=lambda x, y: nn.ZeroPad2d(1)(x)),
    *spelled(
        "interpolate",
        F=lambda x, y: F.interpolate(x, scale_factor=2),
        module=lambda x, y: nn.Upsample(scale_factor=2, mode="bilinear")(x),
    ),
    *spelled(
        "max_pool2d",
        F=lambda x, y: F.max_pool2d(x, 2),
        torch=lambda x, y: torch.max_pool2d(x, 2),
        module=lambda x, y: nn.MaxPool2d(2)(x),
    ),
    *spelled("adaptive_max_pool2d", F=lambda x, y: F.adaptive_max_pool2d(x, 1)),
    *spelled("reshape", torch=lambda x, y: torch.reshape(x, (2, -1)), method=lambda x, y: x.reshape(2, -1)),
    *spelled("view", method=lambda x, y: x.view(-1)),
    *spelled("flatten", torch=lambda x, y: torch.flatten(x, 1), module=lambda x, y: nn.Flatten()(x)),
    *spelled("transpose", torch=lambda x, y: torch.transpose(x, 0, 1), method=lambda x, y: x.transpose(0, 1)),
    *spelled("permute", method=lambda x, y: x.permute(3, 2, 1, 0)),
    *spelled("getitem", index=lambda x, y: x[0], python=lambda x, y: operator.getitem(x, 0)),
    *spelled("chunk", method=lambda x, y: x.chunk(2), torch=lambda x, y: torch.chunk(x, 2)),
    *spelled("split", method=lambda x, y: x.split(1), torch=lambda x, y: torch.split(x, 1)),
    *spelled("mT", attribute=lambda x, y: x.mT),
    *spelled("unsqueeze", method=lambda x, y: x.unsqueeze(0)),
    *spelled("pixel_shuffle", F=lambda x, y: F.pixel_shuffle(x, 2), module=lambda x, y: nn.PixelShuffle(2)(x)),
]
OTHERS = [
    *spelled(
        "mean",
        torch=lambda x, y: torch.mean(x, (2, 3)),
        method=lambda x, y: x.mean((2, 3)),
        keyword=lambda x, y: x.mean(dim=1, keepdim=True),
    ),
    *spelled("avg_pool2d", F=lambda x, y: F.avg_pool2d(x, 2), module=lambda x, y: nn.AvgPool2d(2)(x)),
    *spelled(
        "adaptive_avg_pool2d",
        F=lambda x, y: F.adaptive_avg_pool2d(x, 1),
        module=lambda x, y: nn.AdaptiveAvgPool2d(1)(x),
    ),
    *spelled("adaptive_avg_pool1d", torch=lambda x, y: torch.adaptive_avg_pool1d(x[0], 1)),
    *spelled(
        "softmax",
        torch=lambda x, y: torch.softmax(x, 1),
        method=lambda x, y: x.softmax(1),
        F=lambda x, y: F.softmax(x, dim=1),
        module=lambda x, y: nn.Softmax(1)(x),
    ),
    *spelled(
        "relu",
        F=lambda x, y: F.relu(x),
        torch=lambda x, y: torch.relu(x),
        method=lambda x, y: x.relu(),
        in_place=lambda x, y: x.relu_(),
        torch_in_place=lambda x, y: torch.relu_(x),
        flag=lambda x, y: F.relu(x, inplace=True),
        module=lambda x, y: nn.ReLU(inplace=True)(x),
    ),
    *spelled(
        "sigmoid",
        torch=lambda x, y: torch.sigmoid(x),
        method=lambda x, y: x.sigmoid(),
        in_place=lambda x, y: x.sigmoid_(),
        module=lambda x, y: nn.Sigmoid()(x),
    ),
    *spelled("gelu", F=lambda x, y: F.gelu(x), module=lambda x, y: nn.GELU()(x)),
    *spelled("silu", F=lambda x, y: F.silu(x), module=lambda x, y: nn.SiLU(inplace=True)(x)),
    *spelled("clamp", torch=lambda x, y: torch.clamp(x, 0), in_place=lambda x, y: x.clamp_(0, 6)),
    *spelled("relu6", F=lambda x, y: F.relu6(x)),
    *spelled("batch_norm", module=lambda x, y: nn.BatchNorm2d(4).eval()(x)),
    *spelled("layer_norm", module=lambda x, y: nn.LayerNorm(6)(x)),
    *spelled("dropout", F=lambda x, y: F.dropout(x, 0.5), module=lambda x, y: nn.Dropout(0.5)(x)),
]


@pytest.mark.parametrize(("kind", "spelling"), [*ARITHMETIC, *PRODUCTS, *MOVES, *OTHERS])
def test_every_spelling_has_the_kind_of_its_op(kind, spelling):
    assert kind in {op.kind for function in functions_of(spelling) if (op := op_of(function)) is not None}


@pytest.mark.parametrize(("kind", "spelling"), [*ARITHMETIC, *PRODUCTS])
def test_a_spelling_is_one_call_of_its_kind(kind, spelling):
    assert [KIND_OF.get(function) for function in functions_of(spelling)].count(kind) == 1


SITES = {"cat", "stack", "interpolate", "max_pool2d", "adaptive_max_pool2d"}


@pytest.mark.parametrize(("kind", "spelling"), MOVES)
def test_reshapes_are_no_sites(kind, spelling):
    assert (kind in {KIND_OF.get(function) for function in functions_of(spelling)}) == (kind in SITES)


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [
        *spelled("rsub", operator=lambda x, y: 1 - x, torch=lambda x, y: torch.rsub(x, y)),
        *spelled("rdiv", operator=lambda x, y: 1 / x),
    ],
)
def test_reflected_operators_are_ops_of_their_own_and_no_sites(kind, spelling):
    functions = functions_of(spelling)
    assert kind in {op.kind for function in functions if (op := op_of(function)) is not None}
    assert not any(function in KIND_OF for function in functions)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, y: torch.argsort(x),
        lambda x, y: x.abs(),
        lambda x, y: x // y,
        lambda x, y: x**2,
        lambda x, y: torch.where(x > y, x, y),
        lambda x, y: x.sum(),
        lambda x, y: x.shape,
    ],
    ids=["argsort", "abs", "floor division", "power", "where", "sum", "shape"],
)
def test_what_quantization_is_not_about_has_no_op(spelling):
    assert {op_of(function) for function in functions_of(spelling)} == {None}


def test_an_unhashable_function_has_no_op():
    class Unhashable:
        __hash__ = None

    assert op_of(Unhashable()) is None


# Operands.

X, Y, Z = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
CALLS = [
    pytest.param(torch.add, (X, Y), {}, [X, Y], id="positional"),
    pytest.param(torch.add, (X,), {"other": Y}, [X, Y], id="second by keyword"),
    pytest.param(torch.add, (), {"input": X, "other": Y}, [X, Y], id="both by keyword"),
    pytest.param(torch.add, (X, 1), {"alpha": 2}, [X, 1], id="number"),
    pytest.param(F.linear, (X, Y, Z), {}, [X, Y], id="bias is none"),
    pytest.param(F.conv2d, (X,), {"weight": Y, "stride": 2}, [X, Y], id="weight by keyword"),
    pytest.param(torch.bmm, (X,), {"mat2": Y}, [X, Y], id="mat2"),
    pytest.param(torch.cat, ([X, Y, Z],), {"dim": 1}, [X, Y, Z], id="list"),
    pytest.param(torch.cat, ((X, Y), 1), {}, [X, Y], id="tuple"),
    pytest.param(torch.cat, (), {"tensors": (X, Y)}, [X, Y], id="list by keyword"),
    pytest.param(torch.einsum, ("a,a->a", X, Y), {}, [X, Y], id="einsum"),
    pytest.param(torch.einsum, ("a,a->a", [X, Y]), {}, [X, Y], id="einsum of a list"),
    pytest.param(F.scaled_dot_product_attention, (X, Y), {"value": Z}, [X, Y, Z, None], id="no mask"),
    pytest.param(F.softmax, (X,), {"dim": 1}, [X], id="one"),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "expected"), CALLS)
def test_operands_in_their_order(function, args, kwargs, expected):
    found = operands(op_of(function), args, kwargs)
    assert len(found) == len(expected)
    assert all(one is other for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("function", "args", "kwargs", "expected"), CALLS)
def test_with_operand_replaces_that_one_only(function, args, kwargs, expected):
    op = op_of(function)
    for index in range(len(expected)):
        replaced = operands(op, *with_operand(op, args, kwargs, index, "new"))
        assert replaced[index] == "new"
        assert all(one is other for i, (one, other) in enumerate(zip(replaced, expected, strict=True)) if i != index)


@pytest.mark.parametrize(("function", "args", "kwargs", "expected"), CALLS)
def test_with_operand_leaves_what_it_was_given(function, args, kwargs, expected):
    with_operand(op_of(function), args, kwargs, 0, "new")
    found = operands(op_of(function), args, kwargs)
    assert all(one is other for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("function", "args", "kwargs", "expected"), [c for c in CALLS if c.id.startswith("einsum")])
def test_einsum_still_runs_with_an_operand_replaced(function, args, kwargs, expected):
    args, kwargs = with_operand(op_of(function), args, kwargs, 1, torch.full((1,), 3.0))
    args, kwargs = with_operand(op_of(function), args, kwargs, 0, torch.full((1,), 5.0))
    assert function(*args, **kwargs).item() == 15


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("add", ["input", "other"]),
        ("conv2d", ["input", "weight"]),
        ("bmm", ["input", "mat2"]),
        ("cat", ["tensors_0", "tensors_1"]),
        ("einsum", ["tensors_0", "tensors_1"]),
        ("scaled_dot_product_attention", ["query", "key", "value", "attn_mask"]),
    ],
)
def test_operand_names(kind, names):
    assert [op_named(kind).operand_name(index) for index in range(len(names))] == names


# In place.


@pytest.mark.parametrize(
    "spelling",
    [p.values[1] for p in ARITHMETIC if "in_place" in p.id or "augmented" in p.id],
    ids=[p.id for p in ARITHMETIC if "in_place" in p.id or "augmented" in p.id],
)
def test_an_op_that_writes_into_its_operand_is_known(spelling):
    function = functions_of(spelling)[0]
    assert function in IN_PLACE


def test_only_those_write_into_their_operand():
    for parameter in [*ARITHMETIC, *PRODUCTS, *MOVES]:
        x = torch.rand(2, 4, 6, 6) + 0.5
        version = x._version
        with Calls() as calls:
            parameter.values[1](x, torch.rand(2, 4, 6, 6) + 0.5)
        functions = calls.functions
        assert (x._version != version) == any(function in IN_PLACE for function in functions), parameter.id
