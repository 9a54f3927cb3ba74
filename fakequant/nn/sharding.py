"""What torch's ``fully_shard`` and tensor parallelism split over processes: Parameters that are DTensors."""

from torch import Tensor, nn

from fakequant.errors import InvalidValueError


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; told without importing torch.distributed.tensor, which takes its time."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor, put together from all processes where it is sharded: then all must call this."""
    full: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return full


def split_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor that every process has split over them as another one is; asks no other process."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Split parameters again that a forward of ``fully_shard`` has gathered: what is written into these is lost."""
    for module in model.modules():
        if callable(getattr(module, "reshard", None)) and callable(getattr(module, "unshard", None)):
            module.reshard()  # type: ignore[operator]


def share(tensor: Tensor) -> Tensor:
    """Return what this process has of a sharded tensor, any other tensor as it is; asks no other process."""
    local: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return local


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are split over processes.

    Raises:
        InvalidValueError: it is; names the first such parameter.
    """
    reshard(model)  # a root that a forward has gathered looks whole
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise InvalidValueError(
                f"{name}: expected a parameter as a whole, got one that is split over processes. Quantize before "
                "fully_shard; what tensor parallelism has split cannot be quantized. To export, or to make the model "
                "float again, load its full state_dict (torch.distributed.checkpoint.state_dict) into a model that "
                "is not sharded"
            )
