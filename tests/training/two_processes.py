"""``torchrun --nproc-per-node 2 two_processes.py FOLDER``: one of two processes that train each network on its half.

Saves {case: what came out} as FOLDER/RANK.pt; a case that raises gives its error as text.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import networks
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fakequant as fq
from fakequant.fake_quantize import recompute
from fakequant.nn.walk import named_quantizers
from fakequant.qat import average_ranges, broadcast_ranges, check, follow_ranges, freeze_batchnorm, watch

recompute.SMALL = 0  # as in tests/conftest.py

RANK = int(os.environ["RANK"])
WHOLE = StateDictOptions(full_state_dict=True)
PARALLEL = [(name, "float32") for name in networks.NETWORKS] + [
    ("cnn", "autocast float16"),
    ("residual", "bfloat16"),
    ("transformer", "autocast bfloat16"),
    ("lstm", "bfloat16"),
]


def half(name: str) -> tuple[Tensor, Tensor]:
    return tuple(part[RANK::2] for part in networks.data(name))


def model_of(name: str, precision: str = "float32", learned: bool = True) -> nn.Module:
    """With frozen batch norms, so that two halves of a batch are the same as the whole."""
    return freeze_batchnorm(networks.quantized(name, learned=learned)).to(networks.PRECISIONS[precision][0])


def outcome(model: nn.Module, losses: list[float]) -> dict[str, Any]:
    state = {key.removeprefix("module."): value.clone() for key, value in model.state_dict().items()}
    return {"losses": losses, "state": state}


def parallel(name: str, precision: str) -> dict[str, Any]:
    model = DistributedDataParallel(model_of(name, precision))
    return outcome(model, networks.train(model, half(name), precision))


def compiled() -> dict[str, Any]:
    torch._dynamo.config.optimize_ddp = False  # DDP would cut the graph at its buckets
    inside = torch.compile(model_of("transformer"), backend="aot_eager", fullgraph=True)
    model = DistributedDataParallel(inside)
    losses = networks.train(model, half("transformer"))
    return outcome(inside._orig_mod, losses)


def static_graph() -> dict[str, Any]:
    model = DistributedDataParallel(model_of("residual"), static_graph=True)
    return outcome(model, networks.train(model, half("residual")))


def standing_by() -> list[float]:
    """Learned ranges that only another target uses: its layers are too small for the present one."""
    model, grid = networks.float_network("transformer"), fq.QuantDescriptor(learn_amax="lsq")
    x, _ = networks.data("transformer")
    fq.quantize(model, fq.preset("int8") + fq.Rule("fc", input=grid, weight=grid), example_inputs=x)
    fq.calibrate(model, [x], progress=False)
    assert all(q.stands_by for _, q in named_quantizers(model) if q.descriptor.learn_amax)
    return networks.train(DistributedDataParallel(model.train()), half("transformer"))


def accumulated() -> dict[str, Tensor]:
    """Gradients of two halves of this process's half."""
    model = DistributedDataParallel(model_of("residual"))
    x, y = half("residual")
    for index, context in enumerate((model.no_sync(), contextlib.nullcontext())):
        with context:
            part = slice(2 * index, 2 * index + 2)
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
    return {key.removeprefix("module."): value.clone() for key, value in networks.gradients(model).items()}


def uncalibrated() -> list[float]:
    model = DistributedDataParallel(networks.quantized("residual", calibrated=False))
    return networks.train(model, half("residual"))


def following() -> dict[str, Tensor]:
    """Ranges after a step whose forward began with those of rank 0."""
    model = networks.quantized("residual", calibrated=False)
    follow_ranges(model, momentum=0.5)
    parallel_model = DistributedDataParallel(model)
    networks.train(parallel_model, half("residual"), steps=2)
    seen = {}

    def look(module: nn.Module, _: Any) -> None:
        seen.update({key: value.clone() for key, value in module.state_dict().items() if "quantizer" in key})

    model.register_forward_pre_hook(look)
    parallel_model(half("residual")[0])
    return seen


def broadcast(first_knows: bool) -> dict[str, Tensor]:
    model = model_of("residual")
    if (RANK == 0) != first_knows:
        for _, quantizer in named_quantizers(model):
            quantizer.amax = None
    broadcast_ranges(model)
    DistributedDataParallel(model)
    return {name: value.clone() for name, value in model.state_dict().items() if "quantizer" in name}


def other_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fq.quantize(model if RANK else model[0])
    broadcast_ranges(model)


def averaged() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state before and after ranges that follow data of each process, one of them affine, are averaged."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    fq.quantize(model, fq.preset("int8") + fq.Rule("0", input=fq.QuantDescriptor(8, affine=True)))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    follow_ranges(model)
    model(torch.tensor([[[3.0, -1.0]], [[5.0, -7.0]]][RANK]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average_ranges(model)
    return before, model.state_dict()


def averaged_where_one_saw_nothing() -> None:
    model = nn.Linear(2, 2)
    fq.quantize(model)
    follow_ranges(model)
    if RANK == 0:
        model(torch.ones(1, 2))
    average_ranges(model)


def sharded(model: nn.Module, **policy: Any) -> nn.Module:
    for child in model.children():
        if isinstance(child, networks.Residual | nn.TransformerEncoderLayer):
            fully_shard(child, **policy)
    return fully_shard(model, **policy)


def fully_sharded(name: str) -> dict[str, Any]:
    model = sharded(model_of(name))
    losses = networks.train(model, half(name))
    state = get_model_state_dict(model, options=WHOLE)
    return {"losses": losses, "state": state, "repr": repr(model)}


def sharded_and_loaded() -> list[float]:
    """Losses of one step from a state that only rank 0 has."""
    model = sharded(model_of("residual"))
    trained = model_of("residual")
    networks.train(trained, networks.data("residual"), steps=1)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, trained.state_dict() if RANK == 0 else {}, options=options)
    return networks.train(model, half("residual"), steps=1)


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mixed_fixed() -> dict[str, Any]:
    model = sharded(model_of("transformer", learned=False), mp_policy=MIXED)
    return {"losses": networks.train(model, half("transformer")), "state": get_model_state_dict(model, options=WHOLE)}


def mixed_learned(in_a_group: bool) -> dict[str, Any]:
    model = model_of("transformer")
    if in_a_group:
        fully_shard([q for _, q in named_quantizers(model) if q.descriptor.learn_amax and not q.stands_by])
    sharded(model, mp_policy=MIXED)
    losses = networks.train(model, half("transformer"), steps=1)
    return {"losses": losses, "state": get_model_state_dict(model, options=WHOLE)}


def without_learned_ranges(model: nn.Module) -> nn.Module:
    for _, quantizer in named_quantizers(model):
        quantizer.requires_grad_(False)
    return model


def frozen_in_groups() -> dict[str, Tensor]:
    """Each quantizer is a group of its own, gathered for its own forward and backward only."""
    model = without_learned_ranges(model_of("residual"))
    for _, quantizer in named_quantizers(model):
        fully_shard(quantizer)
    networks.train(sharded(model), half("residual"))
    return get_model_state_dict(model, options=WHOLE)


def after_sharding(change: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """The whole state after a change of shards that a forward in eval mode has gathered."""
    model = sharded(model_of("residual"))
    with torch.no_grad():
        model(half("residual")[0])
    change(model)
    return {key: value for key, value in get_model_state_dict(model, options=WHOLE).items() if "quantizer" in key}


def calibrate_again(model: nn.Module) -> None:
    fq.calibrate(model, [3 * half("residual")[0]], progress=False)


def set_a_range() -> float:
    model = sharded(model_of("residual"))
    model[0].input_quantizer.amax = 1.0
    return model.get_parameter("0._input_quantizer._amax").full_tensor().item()


def other_grid() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fq.quantize(model, fq.preset("int8") + fq.Rule("1", input=fq.QuantDescriptor(8 - RANK)))
    for index, layer in enumerate(model):
        layer.input_quantizer.amax = index + RANK + 1.0
    try:
        broadcast_ranges(model)
    finally:
        assert [layer.input_quantizer.amax.item() for layer in model] == [RANK + 1, RANK + 2]


def not_in_the_group() -> None:
    """The second process asks for the ranges of a group of the first alone."""
    broadcast_ranges(fq.nn.QuantLinear(2, 2), distributed.new_group([0]))


def watched() -> None:
    """A step that is well, then one in which a range of one number, which the first process has, runs away."""
    model = sharded(model_of("residual"))
    runaway = next(p for n, p in model.named_parameters() if n.endswith("weight_quantizer._amax"))
    with watch(model) as watching:
        for factor in (1, 1e6):
            networks.train(model, half("residual"), steps=1)
            with torch.no_grad():
                runaway.to_local().mul_(factor)
            watching.step()


CASES: dict[str, Callable[[], Any]] = {
    **{f"parallel {n} {p}": lambda n=n, p=p: parallel(n, p) for n, p in PARALLEL},
    **{f"fully sharded {n}": lambda n=n: fully_sharded(n) for n in networks.NETWORKS},
    "compiled": compiled,
    "static graph": static_graph,
    "standing by": standing_by,
    "accumulated": accumulated,
    "uncalibrated": uncalibrated,
    "following": following,
    "broadcast known": lambda: broadcast(first_knows=True),
    "broadcast unknown": lambda: broadcast(first_knows=False),
    "other model": other_model,
    "averaged": averaged,
    "averaged where one saw nothing": averaged_where_one_saw_nothing,
    "sharded and loaded": sharded_and_loaded,
    "mixed fixed": mixed_fixed,
    "mixed learned": lambda: mixed_learned(in_a_group=False),
    "mixed learned in a group": lambda: mixed_learned(in_a_group=True),
    "quantize sharded": lambda: fq.quantize(sharded(networks.float_network("residual"))),
    "dequantize sharded": lambda: after_sharding(fq.dequantize),
    "frozen in groups": frozen_in_groups,
    "watched": watched,
    "set a sharded range": set_a_range,
    "calibrate shards": lambda: after_sharding(calibrate_again),
    "check shards": lambda: str(check(sharded(model_of("residual")))),
    "other grid": other_grid,
    "not in the group": not_in_the_group,
}


@contextlib.contextmanager
def two_processes() -> Iterator[None]:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    with two_processes():
        for name, case in CASES.items():
            try:
                found[name] = case()
            except Exception as error:  # a test says which one is right
                found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
