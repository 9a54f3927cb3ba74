"""The tensor graph of one forward: names, values, who is whose operand; and a model that is left as it was."""

import collections
import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint

import fakequant as fq
from fakequant.call_sites import record


class Lambda(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            if isinstance(child, nn.Parameter):
                self.register_parameter(name, child)
            elif isinstance(child, Tensor):
                self.register_buffer(name, child)
            else:
                self.add_module(name, child)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


X = torch.arange(8.0).reshape(2, 4)


def graph_of(function, *args, **children):
    return record(Lambda(function, **children), args or (X,))


def names(graph):
    return [call.name for call in graph.calls]


def last(graph):
    return graph.calls[-1]


# Names.


def test_calls_are_named_by_op_and_occurrence():
    assert names(graph_of(lambda m, x: (x + 1) * (x + 2) - torch.add(x, 3))) == [
        *("add_0", "add_1", "mul_0", "add_2", "sub_0")
    ]


def test_calls_are_named_by_the_module_that_makes_them():
    inner = Lambda(lambda m, x: (x + 1) + 2)
    graph = graph_of(lambda m, x: m.a.b(x + 1) + 1, a=nn.ModuleDict({"b": inner}))
    assert names(graph) == ["add_0", "a.b.add_0", "a.b.add_1", "add_1"]


def test_a_module_with_a_quantized_class_is_one_call_of_its_own():
    graph = graph_of(lambda m, x: m.fc(x) + 1, fc=nn.Linear(4, 4))
    assert [(call.name, call.kind, call.is_module) for call in graph.calls] == [
        ("fc", "linear", True),
        ("add_0", "add", False),
    ]


def test_a_function_that_no_op_is_known_for_has_its_own_name():
    graph = graph_of(lambda m, x: torch.special.erfinv(x.cumsum(0)))
    assert names(graph)[0] == "cumsum_0"
    assert last(graph).op is None


def test_the_root_has_no_prefix():
    assert names(record(nn.Linear(4, 4), (X,))) == [""]


def test_a_module_that_is_called_twice_is_visited_twice():
    graph = graph_of(lambda m, x: m.inner(m.inner(x)), inner=Lambda(lambda m, x: x + 1))
    assert [(call.name, call.visit) for call in graph.calls] == [("inner.add_0", 0), ("inner.add_0", 1)]


def test_occurrences_start_again_in_each_visit():
    graph = graph_of(lambda m, x: m.inner(m.inner(x)), inner=Lambda(lambda m, x: x + 1 + 2))
    assert [call.occurrence for call in graph.calls] == [0, 1, 0, 1]


def test_calls_of_a_name_are_found():
    graph = graph_of(lambda m, x: m.fc(m.fc(x)), fc=nn.Linear(4, 4))
    assert [call.visit for call in graph.named("fc")] == [0, 1]


def test_callees_are_those_of_the_modules_own_forward():
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    graph = graph_of(lambda m, x: m.a(x), a=inner, b=nn.ReLU())
    assert graph.callees == {"": frozenset({"a"}), "a": frozenset({"a.0", "a.1"})}


def test_a_module_under_two_names_goes_by_the_first():
    shared = nn.Linear(4, 4)
    graph = graph_of(lambda m, x: m.b(m.a(x)), a=shared, b=shared)
    assert names(graph) == ["a", "a"]


def test_a_method_of_a_child_counts_for_the_caller():
    child = Lambda(lambda m, x: x)
    child.help = lambda x: x + 1
    assert names(graph_of(lambda m, x: m.child.help(x) + 1, child=child)) == ["add_0", "add_1"]


def test_a_recursive_module_counts_each_forward_for_itself():
    def function(m, x, depth=2):
        return x + 1 if depth == 0 else m(x + 1, depth - 1) + 2

    graph = graph_of(function)
    assert [(call.occurrence, call.visit) for call in graph.calls] == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 0)]


# Values.


def test_an_operand_is_the_output_of_the_call_before():
    graph = graph_of(lambda m, x: (x + 1) * 2)
    assert last(graph).operand(0) is graph.calls[0].output


def test_uses_name_the_call_and_the_operand():
    graph = graph_of(lambda m, x: torch.sub(other=(y := x + 1), input=y * 2))
    add, mul, sub = graph.calls
    assert add.output.uses == [(mul, 0), (sub, 1)]


def test_a_value_that_is_both_operands_is_used_twice():
    graph = graph_of(lambda m, x: (y := x + 1) * y)
    assert graph.calls[0].output.uses == [(last(graph), 0), (last(graph), 1)]


def test_an_argument_that_no_quantizer_is_for_is_operand_minus_one():
    graph = graph_of(lambda m, x: F.linear(x, torch.ones(4, 4), x.sum(1)[:1].expand(4)))
    assert last(graph).operand(2) is None
    assert [operand for call, operand in graph.calls[-2].output.uses if call is last(graph)] == [-1]


def test_a_number_is_no_operand():
    assert last(graph_of(lambda m, x: x + 1)).operand(1) is None


def test_shape_and_dtype_of_a_value():
    value = last(graph_of(lambda m, x: x[:, :3].double() + 1)).output
    assert (value.shape, value.dtype) == ((2, 3), torch.float64)


@pytest.mark.parametrize(
    "update",
    [
        lambda y: y.relu_(),
        lambda y: F.relu(y, inplace=True),
        lambda y: nn.ReLU(inplace=True)(y),
        lambda y: y.add_(1),
        lambda y: y.__iadd__(1),
        lambda y: torch.sigmoid_(y),
    ],
    ids=["relu_", "inplace=True", "nn.ReLU", "add_", "+=", "torch.sigmoid_"],
)
def test_a_tensor_updated_in_place_is_the_output_of_the_update(update):
    def function(m, x):
        y = x * 2
        update(y)
        return y - 1

    graph = graph_of(function)
    mul, updating, sub = graph.calls
    assert sub.operand(0) is updating.output
    assert sub.operand(0) is not mul.output
    assert updating.operand(0) is mul.output


def test_what_was_read_before_an_update_is_the_old_value():
    def function(m, x):
        y = x * 2
        before = y - 1
        y += before
        return y / 2

    mul, sub, add, div = graph_of(function).calls
    assert sub.operand(0) is mul.output
    assert div.operand(0) is add.output


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y[0].mul_(3),
        lambda y: y[:, 1:].relu_(),
        lambda y: y.view(-1).add_(1),
        lambda y: y.__setitem__(0, 1.0),
        lambda y: y.chunk(2)[0].zero_(),
        lambda y: y.detach().neg_(),
    ],
    ids=["index", "slice", "view", "setitem", "chunk", "detach"],
)
def test_a_write_through_a_view_makes_another_value(write):
    def function(m, x):
        y = x * 2
        write(y)
        return y - 1

    graph = graph_of(function)
    assert last(graph).operand(0) is not graph.calls[0].output
    assert last(graph).operand(0).is_activation


def test_a_view_that_was_taken_before_a_write_is_another_value_too():
    def function(m, x):
        y = x * 2
        view = y.view(-1)
        y += 1
        return view - 1

    graph = graph_of(function)
    assert last(graph).operand(0) is not graph.calls[1].output


def test_the_address_of_a_freed_tensor_is_not_its_identity():
    def function(m, x):
        for _ in range(50):
            x = torch.relu(x * 1.5 + 1)
        return x

    calls = graph_of(function).calls
    assert all(later.operand(0) is earlier.output for earlier, later in itertools.pairwise(calls))
    assert len({call.output.index for call in calls}) == 150


def test_the_models_output_is_marked():
    graph = graph_of(lambda m, x: {"y": [(x + 1) * 2]})
    assert [call.output.is_output for call in graph.calls] == [False, True]


@pytest.mark.parametrize("kind", ["chunk", "split", "unbind"])
def test_every_output_of_a_call_is_a_value(kind):
    calls = {"chunk": lambda x: x.chunk(2, 1), "split": lambda x: x.split(2, 1), "unbind": lambda x: x.unbind(0)}
    graph = graph_of(lambda m, x: calls[kind](x)[1] + 1)
    assert last(graph).operand(0) is graph.calls[0].outputs[1]


# Constants and activations.


@pytest.mark.parametrize(
    ("function", "is_constant"),
    [
        (lambda m, x: m.weight * 2, True),
        (lambda m, x: m.buffer.exp() + m.weight, True),
        (lambda m, x: torch.ones(3) * 2, True),
        (lambda m, x: torch.arange(3.0) + 1, True),
        (lambda m, x: x * m.weight, False),
        (lambda m, x: torch.zeros_like(x) + 1, False),
        (lambda m, x: m.weight + x.mean(), False),
    ],
    ids=["parameter", "buffer", "ones", "arange", "product", "zeros_like", "sum"],
)
def test_what_depends_on_the_input_is_no_constant(function, is_constant):
    graph = graph_of(function, weight=nn.Parameter(torch.ones(4)), buffer=torch.ones(1))
    assert last(graph).output.is_constant is is_constant


@pytest.mark.parametrize(
    "write",
    [lambda y, x: y.__setitem__((slice(None), slice(2)), x[:, :2]), lambda y, x: y[:, :2].copy_(x[:, :2])],
    ids=["setitem", "view"],
)
def test_a_constant_that_the_input_is_written_into_is_none(write):
    def function(m, x):
        y = torch.zeros(2, 4)
        write(y, x)
        return y + 1

    assert last(graph_of(function)).operand(0).is_activation


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_only_floating_point_is_an_activation(dtype):
    assert not last(graph_of(lambda m, x: x.to(dtype) & 1)).output.is_activation


def test_activations_of_a_call_leave_constants_out():
    graph = graph_of(lambda m, x: torch.add(m.weight, x), weight=nn.Parameter(torch.ones(4)))
    assert [index for index, _ in graph.activations(last(graph))] == [1]


def test_a_parameter_goes_by_its_full_name():
    inner = Lambda(lambda m, x: F.linear(x, m.weight), weight=nn.Parameter(torch.ones(4, 4)))
    assert last(graph_of(lambda m, x: m.inner(x), inner=inner)).operand(1).parameter == "inner.weight"


def test_the_weight_of_a_layer_goes_by_its_full_name():
    assert last(graph_of(lambda m, x: m.fc(x), fc=nn.Linear(4, 4))).operand(1).parameter == "fc.weight"


def test_a_tied_parameter_goes_by_its_first_name():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    one, other = graph_of(lambda m, x: m.b(m.a(x)), a=first, b=second).calls
    assert one.operand(1) is other.operand(1)
    assert other.operand(1).parameter == "a.weight"


def test_a_transposed_parameter_is_a_constant_without_name():
    graph = graph_of(lambda m, x: x @ m.weight.t(), weight=nn.Parameter(torch.ones(4, 4)))
    weight = last(graph).operand(1)
    assert weight.is_constant
    assert weight.parameter == ""


# What goes in and comes out.


@dataclasses.dataclass
class Pair:
    one: Tensor
    other: Tensor


Named = collections.namedtuple("Named", "one other")
CONTAINERS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"one": a, "other": b},
    "nested": lambda a, b: {"one": [a], "other": (b, None)},
    "namedtuple": Named,
    "dataclass": Pair,
    "ordered dict": lambda a, b: collections.OrderedDict(one=a, other=b),
}
GET = {
    "tuple": lambda c: c[1],
    "list": lambda c: c[1],
    "dict": lambda c: c["other"],
    "nested": lambda c: c["other"][0],
    "namedtuple": lambda c: c.other,
    "dataclass": lambda c: c.other,
    "ordered dict": lambda c: c["other"],
}
every_container = pytest.mark.parametrize("container", CONTAINERS)


@every_container
def test_every_tensor_in_an_output_is_an_output(container):
    graph = graph_of(lambda m, x: CONTAINERS[container](x + 1, x + 2))
    assert all(call.output.is_output for call in graph.calls)


@every_container
def test_an_input_inside_a_container_is_an_activation(container):
    graph = graph_of(lambda m, c: GET[container](c) + 1, CONTAINERS[container](X, X + 1))
    assert last(graph).operand(0).is_activation
    assert last(graph).operand(0).producer is None


@every_container
def test_containers_between_modules_lose_nothing(container):
    inner = Lambda(lambda m, c: CONTAINERS[container](GET[container](c), GET[container](c) * 2))
    graph = graph_of(lambda m, x: GET[container](m.inner(CONTAINERS[container](x, x + 1))) - 1, inner=inner)
    add, mul, sub = graph.calls
    assert (mul.operand(0), sub.operand(0)) == (add.output, mul.output)


def test_keyword_arguments_of_the_model():
    graph = record(Lambda(lambda m, x, *, mask: x + mask), (X,), {"mask": X * 2})
    assert [value.is_activation for _, value in graph.activations(last(graph))] == [True, True]


def test_a_layer_that_is_called_by_keyword():
    graph = graph_of(lambda m, x: m.fc(input=x + 1), fc=nn.Linear(4, 4))
    assert last(graph).operand(0) is graph.calls[0].output


def test_a_layer_with_two_outputs():
    pool = nn.MaxPool1d(2, return_indices=True)
    graph = graph_of(lambda m, x: m.pool(x)[0] + 1, pool=pool)
    assert last(graph).operand(0) is graph.calls[0].outputs[0]


# Inside torch's composite modules.


def test_multihead_attention_is_seen_inside():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    graph = record(Lambda(lambda m, x: m.mha(x, x, x, need_weights=False)[0], mha=attention), (torch.randn(1, 3, 8),))
    seen = [call.name for call in graph.calls if call.op is not None and call.role.value in ("weighted", "attention")]
    assert seen == ["mha.linear_0", "mha.scaled_dot_product_attention_0", "mha.out_proj"]


def test_an_encoder_layer_is_seen_inside():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    graph = record(encoder, (torch.randn(1, 3, 8),))
    layers = [call.name for call in graph.calls if call.is_module and call.role.value == "weighted"]
    assert layers == [f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.out_proj", "linear1", "linear2")]


def test_an_encoder_layer_is_given_its_fused_class_back():
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    record(encoder, (torch.randn(1, 3, 8),))
    assert (type(encoder), type(encoder.self_attn)) == (nn.TransformerEncoderLayer, nn.MultiheadAttention)


def test_an_lstm_is_one_call_with_all_of_its_weights():
    call = last(record(nn.LSTM(4, 4, batch_first=True), (torch.randn(1, 3, 4),)))
    assert call.op.operands == ("input", "weight_ih_l0", "weight_hh_l0")
    assert [value.is_activation for value in call.operands] == [True, False, False]


def test_a_quantized_layer_is_recorded_as_the_float_one():
    layer = nn.Linear(4, 4)
    fq.quantize(layer)
    assert [call.kind for call in record(layer, (X,)).calls] == ["linear"]


def test_checkpointed_parts_are_seen():
    graph = graph_of(lambda m, x: checkpoint.checkpoint(m.fc, x + 1, use_reentrant=False), fc=nn.Linear(4, 4))
    assert names(graph) == ["add_0", "fc"]


def test_an_example_that_was_made_in_inference_mode():
    with torch.inference_mode():
        x = X + 0
    assert names(graph_of(lambda m, x: x + 1, x)) == ["add_0"]


def test_a_forward_in_inference_mode():
    assert names(graph_of(torch.inference_mode()(lambda m, x: x + 1))) == ["add_0"]


# User hooks.


@pytest.mark.parametrize("kind", ["pre", "forward"])
def test_calls_of_a_childs_hooks_are_not_the_callers(kind):
    child = nn.Identity()
    if kind == "pre":
        child.register_forward_pre_hook(lambda module, args: (args[0] + 0,))
    else:
        child.register_forward_hook(lambda module, args, output: output + 0)
    graph = graph_of(lambda m, x: m.child(x) + 1, child=child)
    assert [call.name for call in graph.calls if call.module == ""] == ["add_0"]


# The model is left as it was.


class State(nn.Module):
    """Modules of every kind that a forward could change."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.bn = nn.BatchNorm2d(16)
        self.drop = nn.Dropout()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
        self.fc = nn.Linear(16, 4)
        self.fails = False

    def forward(self, x):
        x = self.drop(F.relu(self.bn(self.conv(x)), inplace=True))
        if self.fails:
            raise ValueError("as asked")
        return self.fc(self.encoder(x.flatten(2).transpose(1, 2))).sum(1)


IMAGE = torch.randn(2, 3, 8, 8)


def snapshot(model):
    return {
        name: (type(m), m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks), list(m._modules), list(vars(m)))
        for name, m in model.named_modules()
    }


def recorded(model, fails=False):
    model.fails = fails
    try:
        record(model, (IMAGE,))
    except ValueError:
        assert fails
    model.fails = False
    return model


after_any_forward = pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])


@after_any_forward
def test_classes_modes_hooks_and_children_stay(fails):
    model = State().train()
    model.bn.eval()
    model.conv.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    assert snapshot(recorded(model, fails)) == before


@after_any_forward
def test_parameters_and_buffers_stay(fails):
    model = State().train()
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(recorded(model, fails).state_dict(), before, rtol=0, atol=0)


@after_any_forward
def test_switches_of_quantizers_stay(fails):
    model = State()
    fq.quantize(model)
    model.conv.input_quantizer.disable()
    model.fc.input_quantizer.enable_calib()
    before = fq.quant_summary(model)
    assert fq.quant_summary(recorded(model, fails)) == before


@after_any_forward
def test_no_mode_stays_on_torchs_stack(fails):
    recorded(State(), fails)
    assert _get_current_function_mode_stack() == []


@after_any_forward
def test_gradients_stay_on(fails):
    recorded(State(), fails)
    assert torch.is_grad_enabled()


def test_the_error_is_the_models_own():
    model = State()
    model.fails = True
    with pytest.raises(ValueError, match="as asked"):
        record(model, (IMAGE,))


def test_the_example_is_not_written_to():
    x = X.clone()
    model = Lambda(lambda m, x: x + 1)
    record(model, (x,))
    assert torch.equal(x, X)


def test_no_gradient_is_left():
    model = recorded(State())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_randomness_leaves_the_generator():
    model = State().train()
    before = torch.get_rng_state()
    recorded(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_draws_random_numbers_leaves_the_generator():
    before = torch.get_rng_state()
    graph_of(lambda m, x: x + torch.rand_like(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_buffer_that_the_forward_writes_stays():
    model = Lambda(lambda m, x: x + m.count.add_(1), count=torch.zeros(()))
    record(model, (X,))
    assert model.count == 0


def test_recording_twice_gives_the_same():
    model = State()
    assert names(record(model, (IMAGE,))) == names(record(model, (IMAGE,)))
