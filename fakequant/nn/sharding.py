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


def share(tensor: Tensor) -> Tensor:
    """Return what this process has of a sharded tensor, any other tensor as it is; asks no other process."""
    local: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return local


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are split over processes.

    Raises:
        InvalidValueError: it is; names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise InvalidValueError(
                f"{name}: expected a parameter as a whole, got one that is split over processes. Quantize before "
                "fully_shard; to export, or to make the model float again, load its full state_dict "
                "(torch.distributed.checkpoint.state_dict) into a model that is not sharded"
            )
