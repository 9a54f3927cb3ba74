import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fakequant as fq
from fakequant import InvalidValueError, QuantDescriptor, qat
from fakequant.fake_quantize import fake_quantize, recompute, recompute_quantized
from fakequant.nn.walk import named_quantizers
from fakequant.qat import save_memory, stop_saving_memory

RECIPES = {
    "int8": fq.preset("int8"),
    "affine": fq.preset("int8") + fq.Rule(input=QuantDescriptor(8, affine=True)),
    "fp8": fq.preset("fp8"),
    "dynamic": fq.preset("dynamic"),
    "blocks": fq.preset("int8") + fq.Rule(type="Linear", weight=QuantDescriptor(4, block_size=3)),
    "lsq": fq.preset("int8")
    + fq.Rule(input=QuantDescriptor(4, learn_amax="lsq"), weight=QuantDescriptor(4, axis=0, learn_amax="lsq")),
    "lsq+": fq.preset("int8") + fq.Rule(input=QuantDescriptor(4, affine=True, learn_amax="lsq+")),
    "pact": fq.preset("int8") + fq.Rule(input=QuantDescriptor(4, learn_amax="pact")),
}


class Residual(nn.Module):
    """Convolution, batch norm, ReLU, an add, and a linear layer whose weight is used transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = (x + self.second(x)).relu()
        return self.linear(x.flatten(2).transpose(1, 2))


def quantized(recipe="int8", model=None, shape=(2, 3, 6, 6), **options):
    torch.manual_seed(0)
    model = Residual() if model is None else model
    fq.quantize(model, RECIPES[recipe], **options)
    if recipe != "dynamic":
        fq.calibrate(model, [torch.randn(shape)], "max", progress=False)
    return model.train()


def gradients(model, x, context=None):
    """The gradients of one step, by name, and that of the input."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    with context or torch.enable_grad():
        loss = model(x).float().square().sum()
    loss.backward()
    return {"x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def by_torch():
    """Where somebody else decides what is kept, fakequant does nothing: here they keep it as it is."""
    return saved_tensors_hooks(lambda x: x, lambda x: x)


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


class Alive(TorchDispatchMode):
    """Counts the bytes of what operators made and somebody still holds."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return result

    def bytes(self):
        return sum(size for made, size in self.made.items() if not made.expired())


def kept(model, x, context=None):
    """Bytes that a forward pass keeps for backward."""
    with Alive() as alive, context or torch.enable_grad():
        loss = model(x).float().square().mean()
    size = alive.bytes()
    loss.backward()
    return size


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 1.5


# The same gradients


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("saving", [lambda model: model, save_memory], ids=["default", "save_memory"])
def test_gradients_are_the_same(recipe, autocast, saving, x):
    def step(context):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return gradients(model, x, context)

    model = saving(quantized(recipe))
    assert_same(step(None), step(by_torch()))


@pytest.mark.parametrize("recipe", ["int8", "lsq"])
@pytest.mark.parametrize("saving", [lambda model: model, save_memory], ids=["default", "save_memory"])
def test_gradients_are_the_same_with_call_sites(recipe, saving, x):
    model = saving(quantized(recipe, example_inputs=(x,), target="onnxruntime"))
    assert_same(gradients(model, x), gradients(model, x, by_torch()))


OTHERS = {
    "lstm": (lambda: fq.nn.QuantLSTM(4, 5, 2, batch_first=True), lambda model, x: model(x)[0]),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), lambda model, x: model(x)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 2, 3), lambda model, x: model(x)),
    "in place": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        lambda model, x: model(x),
    ),
}


@pytest.mark.parametrize(("make", "call"), OTHERS.values(), ids=OTHERS)
def test_gradients_of_other_layers_are_the_same(make, call):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, x):
            return call(self.inner, x)

    model, x = save_memory(quantized(model=Model(), shape=(2, 3, 4))), torch.randn(2, 3, 4)
    assert_same(gradients(model, x), gradients(model, x, by_torch()))


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[::2, 1:],
    "expanded": lambda x: x[:1].expand(6, -1),
    "number": lambda x: x[0, 0],
}


@pytest.mark.parametrize(
    "use", [lambda q: q, torch.t, lambda q: q.reshape(-1)[1:]], ids=["whole", "transposed", "part"]
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_view_of_any_layout_is_made_again(layout, use):
    def gradient():
        leaf = x.clone().requires_grad_()
        use(fake_quantize(layout(leaf), torch.tensor(0.3), -4, 3)).square().sum().backward()
        return leaf.grad

    x = torch.randn(6, 4)
    expected = gradient()
    with recompute_quantized():
        assert torch.equal(gradient(), expected)


def test_what_was_quantized_twice_is_made_again_twice():
    x = torch.randn(50, requires_grad=True)
    with Alive() as alive:
        with recompute_quantized():
            loss = fake_quantize(fake_quantize(x, torch.tensor(0.1), -8, 7), torch.tensor(0.3), -4, 3).square().sum()
        assert alive.bytes() < x.nbytes
    loss.backward()
    fine = (x.detach() / 0.1).round().clamp(-8, 7) * 0.1
    torch.testing.assert_close(x.grad, 2 * (fine / 0.3).round().clamp(-4, 3) * 0.3 * ((x > -0.85) & (x < 0.75)))


@torch.no_grad()
def tripled(x):
    return x.mul_(3)


COPIES = {
    "dtype": lambda q: q.to(torch.bfloat16),
    "dtype and layout": lambda q: q.to(torch.bfloat16, memory_format=torch.channels_last),
    "part": lambda q: q.to(torch.bfloat16).flatten(1)[:, 3:],
    "changed before": lambda q: q.mul_(3).to(torch.bfloat16),
    "changed after": lambda q: q.to(torch.bfloat16).mul_(3),
    "twice": lambda q: q.to(torch.bfloat16).to(torch.float64),
    "complex": lambda q: torch.view_as_real(torch.view_as_complex(q.reshape(-1, 2)).square()),
    "imaginary": lambda q: torch.view_as_complex(q.reshape(-1, 2)).conj().imag,
    "complex copy": lambda q: torch.view_as_real(torch.view_as_complex(q.double().reshape(-1, 2)).square()),
    "imaginary copy": lambda q: torch.view_as_complex(q.double().reshape(-1, 2)).conj().imag,
    "copy changed without gradient": lambda q: tripled(q.to(torch.bfloat16)),
    "bits": lambda q: q * q.detach().view(torch.int32).remainder(7),
}


@pytest.mark.parametrize("use", COPIES.values(), ids=COPIES)
def test_any_copy_gives_the_same_gradient(use):
    def gradient():
        leaf = x.clone().requires_grad_()
        use(fake_quantize(leaf * 1, torch.tensor(0.3), -4, 3)).square().sum().backward()
        return leaf.grad

    x = torch.randn(2, 4, 3, 3)
    expected = gradient()
    with recompute_quantized():
        assert torch.equal(gradient(), expected)


CHANGES = {
    "in place": lambda q: q.mul_(3),
    "detached": lambda q: q.detach().mul_(3),
    "data": lambda q: setattr(q, "data", q.data * 3),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_hook_may_change_what_was_quantized(change, autocast, x):
    def hook(module, args, output):
        with torch.no_grad():
            change(output)

    def step(context):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return gradients(model, x, context)

    model = quantized()
    model.linear.input_quantizer.register_forward_hook(hook)
    assert_same(step(None), step(by_torch()))


def test_a_second_derivative_is_the_same(x):
    def second(model):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), model.linear.weight)[0]

    model = save_memory(quantized())
    ours = second(model)
    with by_torch():
        assert torch.equal(ours, second(model))


def test_backward_twice_gives_the_same_twice(x):
    model = save_memory(quantized())
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    first = model.linear.weight.grad.clone()
    loss.backward()
    assert torch.equal(model.linear.weight.grad, 2 * first)


def test_ranges_that_move_before_backward_do_not_matter(x):
    def accumulated(model, context):
        qat.follow_ranges(model)
        with context:
            losses = [model(x * factor).square().sum() for factor in (1, 3)]
        sum(losses).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    model = save_memory(quantized())
    assert_same(accumulated(copy.deepcopy(model), torch.enable_grad()), accumulated(model, by_torch()))


# Tensors that were changed


def test_an_input_that_was_changed_before_backward_is_an_error():
    leaf = torch.randn(5, requires_grad=True)
    with recompute_quantized():
        x = leaf * 1
        loss = fake_quantize(x, torch.tensor(0.1), -8, 7).square().sum()
    x.add_(1)
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation: torch.FloatTensor \[5\], expected version 0"
    ):
        loss.backward()


def test_a_result_that_was_changed_is_kept_as_it_is():
    x = torch.tensor([0.26, -0.1], requires_grad=True)
    with recompute_quantized():
        loss = fake_quantize(x, torch.tensor(0.25), -8, 7).mul_(3).square().sum()
    loss.backward()
    assert x.grad.tolist() == [2 * 0.75 * 3, 0.0]


# Less memory


def deep(layers=4):
    blocks = [(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*(layer for block in blocks for layer in block))


@pytest.mark.parametrize("recipe", ["int8", "lsq", "affine", "dynamic"])
def test_convolutions_norms_and_activations_keep_what_the_float_model_keeps(recipe):
    x = torch.randn(2, 4, 32, 32, requires_grad=True)
    base = kept(deep().train(), x)
    model = quantized(recipe, deep(), x.shape)
    assert 1.3 < kept(model, x, by_torch()) / base < 1.55
    assert kept(model, x) / base < 1.03


@pytest.mark.parametrize("saving", [lambda model: model, save_memory], ids=["default", "save_memory"])
def test_autocast_keeps_no_copy_in_its_dtype(saving):
    """Float32 that is kept: what tanh returns, and what ``kept`` squares. The rest would be a copy for each layer."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(512, 8, requires_grad=True)
    saving(quantized(model=model, shape=x.shape))
    run = lambda x: model[2](model[1](model[0](x).float()))  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(run, x, by_torch()) > 2.9 * x.nbytes
        assert kept(run, x) < 2.1 * x.nbytes


class Squared(fq.nn.QuantInputMixin, nn.Identity):
    def forward(self, x):
        return self._input_quantizer(x).square()


def test_a_quantized_class_of_your_own_keeps_no_copy_of_its_input():
    model, x = Squared(), torch.randn(100, requires_grad=True)
    assert kept(model, x, by_torch()) >= 2 * x.nbytes
    assert kept(model, x) < 1.2 * x.nbytes


def test_save_memory_keeps_no_copy_of_a_weight():
    x, model = torch.randn(2, 300, requires_grad=True), nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    quantized(model=model, shape=x.shape)
    assert kept(model, x) > 2 * model[0].weight.nbytes
    assert kept(save_memory(model), x) < 0.1 * model[0].weight.nbytes


class AttentionModule(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(32, 2, batch_first=True), need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class AttentionCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.packed, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.packed(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


X = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
ATTENTIONS = {
    "module": lambda: quantized(model=AttentionModule(need_weights=False), shape=X.shape),
    "module with weights": lambda: quantized(model=AttentionModule(need_weights=True), shape=X.shape),
    "call": lambda: quantized(model=AttentionCall(), shape=X.shape, example_inputs=(X,), target="tensorrt"),
}


@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_keeps_no_copy_of_its_quantized_heads(make):
    # Query, key, value, the probabilities, what the last layer takes and what it gives: each of the size of x.
    assert 5.9 < kept(save_memory(make()), X.clone().requires_grad_()) / X.nbytes < 6.1


def test_nothing_is_kept_once_the_loss_is_gone(x):
    model = save_memory(quantized())
    with Alive() as alive:
        loss = model(x).square().sum()
        del loss
    assert alive.bytes() == 0


def test_one_input_without_gradient_is_not_copied_for_each_layer():
    model, x = nn.ModuleList(nn.Linear(8, 1) for _ in range(5)), torch.randn(200, 8)
    for layer in model:
        fq.quantize(layer)
        layer.input_quantizer.amax = 3.0
    run = lambda x: sum(layer(x) for layer in model)  # noqa: E731
    assert kept(run, x, by_torch()) > 5 * x.nbytes
    assert kept(run, x) < x.nbytes


def test_small_tensors_are_kept(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 100)
    for size, expected in ((99, 2), (100, 1)):
        x = torch.randn(size, requires_grad=True)
        assert round(kept(Squared(), x) / x.nbytes) == expected


def test_no_cycle_is_left_for_the_garbage_collector(x):
    model = quantized()
    model(x)
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(20):
            model(x)
        assert len(gc.get_objects()) < before + 20
    finally:
        gc.enable()


# An ordinary module


def is_free():
    """Whether torch saves tensors as it always does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_stopping_keeps_weights_again(x):
    model = quantized()
    expected = kept(model, x)
    assert kept(save_memory(model), x) < expected
    assert kept(stop_saving_memory(model), x) == expected


@pytest.mark.parametrize("change", [save_memory, stop_saving_memory])
def test_a_float_model_is_refused(change):
    with pytest.raises(InvalidValueError, match="expected a quantized model, got no quantizer in Linear"):
        change(nn.Linear(2, 2))


def from_manifest(model):
    made = fq.quantize_like(Residual(), fq.manifest_of(model))
    made.load_state_dict(model.state_dict())
    return made.train()


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), from_manifest],
    ids=["deepcopy", "pickle", "manifest"],
)
def test_a_copy_saves_memory_too(copied, x):
    model = save_memory(quantized())
    assert kept(copied(model), x) == kept(model, x)


def test_the_state_dict_is_the_same():
    model = quantized()
    assert list(save_memory(copy.deepcopy(model)).state_dict()) == list(model.state_dict())


def test_an_error_in_forward_ends_it():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        quantized(model=nn.Linear(2, 2), shape=(1, 2))(torch.randn(1, 3))
    assert is_free()


def test_what_an_interrupt_has_left_is_not_used(x):
    """As if it had come at the first instruction of ``__exit__``."""
    expected = gradients(quantized(), x)
    left = recompute_quantized()
    left.__enter__()
    try:
        model = quantized()
        assert_same(gradients(model, x), expected)
        with Alive() as alive:
            model(x)
        assert alive.bytes() == 0
    finally:
        left.__exit__(None, None, None)


def test_what_is_inside_another_does_not_end_it():
    x = torch.randn(50, requires_grad=True)
    with Alive() as alive:
        with recompute_quantized():
            with recompute_quantized():
                pass
            loss = fake_quantize(x, torch.tensor(0.3), -4, 3).square().sum()
        assert alive.bytes() < x.nbytes
    loss.backward()


def test_nothing_begins_without_gradient(x):
    model = quantized()
    model.first.input_quantizer.register_forward_hook(lambda *_: free.append(is_free()))
    free = []
    with torch.no_grad():
        model(x)
    model(x)
    assert free == [True, False]


# Beside what else decides about saved tensors


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoints_inside_the_model_go_on(use_reentrant, x):
    class Checkpointed(Residual):
        def forward(self, x):
            if not torch.is_grad_enabled():
                return super().forward(x)
            x = checkpoint(lambda x: self.norm(self.first(x)).relu(), x, use_reentrant=use_reentrant)
            return self.linear(checkpoint(self.second, x, use_reentrant=use_reentrant).flatten(2).transpose(1, 2))

    model = quantized(model=Checkpointed())
    saving = save_memory(copy.deepcopy(model))
    x.requires_grad_()
    assert kept(saving, x) < kept(model, x)
    assert_same(gradients(saving, x), gradients(model, x))


def test_a_checkpoint_around_the_model_decides(x):
    model = quantized()
    run = lambda model: lambda x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    expected = kept(run(model), x)
    assert kept(run(save_memory(model)), x) == expected


def test_save_on_cpu_around_the_model_decides(x):
    model = save_memory(quantized())
    expected = gradients(quantized(), x)
    with save_on_cpu():
        assert_same(gradients(model, x), expected)


def test_functional_gradients_of_idle_quantizers(x):
    model = quantized()
    for _, quantizer in named_quantizers(model):
        quantizer.disable()
    expected = gradients(model.eval(), x)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().sum()  # noqa: E731
    for name, gradient in torch.func.grad(loss)(parameters, x).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_trains_alike(x):
    model = quantized().eval()
    expected = gradients(model, x)
    assert_same(gradients(torch.jit.trace(model, x), x), expected)


@pytest.mark.parametrize("recipe", ["int8", "lsq"])
def test_a_compiled_model_is_one_graph_that_trains_alike(recipe, x):
    def steps(model, forward):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            optimizer.step()
        return dict(model.named_parameters())

    torch.compiler.reset()
    model = quantized(recipe, example_inputs=(x,), target="onnxruntime")
    saving, graphs = save_memory(copy.deepcopy(model)), CompileCounterWithBackend("aot_eager")
    ours = steps(saving, torch.compile(saving, fullgraph=True, backend=graphs))
    for name, expected in steps(model, model).items():
        torch.testing.assert_close(ours[name], expected, msg=name)
    assert graphs.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_a_compiled_part_of_the_model_stays_one_graph(x):
    torch.compiler.reset()
    model = quantized()
    expected = gradients(model, x)
    model.second.compile(fullgraph=True, backend="aot_eager")
    assert_same(gradients(save_memory(model), x), expected)


def test_forward_and_backward_in_one_graph(x, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    torch.compiler.reset()
    model = save_memory(quantized("lsq", example_inputs=(x,), target="onnxruntime"))

    def step():
        loss = model(x).square().mean()
        loss.backward()

    model.zero_grad()
    step()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.compile(step, fullgraph=True, backend="aot_eager")()
    for ours, eager in zip([p.grad for p in model.parameters()], expected, strict=True):
        torch.testing.assert_close(ours, eager)
