import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fakequant.arithmetic import as_rows, reduce_amax, reduce_range
from fakequant.arithmetic.reductions import flat_in_memory_order

CHANNELS_LAST = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 2), (0, 1, 2)], ids=str)
def test_each_kept_index_is_a_row(axis):
    x = torch.randn(3, 4, 5)
    keep = [] if axis is None else [a % 3 for a in ((axis,) if isinstance(axis, int) else axis)]
    front = np.moveaxis(x.numpy(), keep, range(len(keep)))
    rows = as_rows(x, axis)
    assert np.array_equal(rows.numpy(), front.reshape(int(np.prod(front.shape[: len(keep)])), -1))


def test_channels_last_is_flattened_without_a_copy():
    assert flat_in_memory_order(CHANNELS_LAST).data_ptr() == CHANNELS_LAST.data_ptr()


@pytest.mark.parametrize("reduce", [reduce_amax, reduce_range])
def test_channels_last_is_reduced_in_the_order_of_its_memory(reduce):
    """Over several strides ``aten.aminmax`` copies, which takes ten times as long as the reduction."""
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.aminmax.default:
                read.extend(args)
            return func(*args, **(kwargs or {}))

    with Reads():
        reduce(CHANNELS_LAST)
    assert [(x.data_ptr(), x.stride()) for x in read] == [(CHANNELS_LAST.data_ptr(), (1,))]


@pytest.mark.parametrize("strict", [True, False])
def test_an_exporter_sees_extremes_of_named_axes_in_any_memory_format(strict):
    class Range(torch.nn.Module):
        def forward(self, x):
            return reduce_amax(x)

    nodes = torch.export.export(Range(), (CHANNELS_LAST,), strict=strict).graph.nodes
    called = [str(node.target) for node in nodes if node.op == "call_function" and "aten" in str(node.target)]
    assert called == [f"aten.{name}.default" for name in ("detach", "amin", "amax", "neg", "maximum")]
