"""What every test has: a fixed seed, no wait for a GPU that is not there, torchvision beside any torch."""

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch

from fakequant.fake_quantize import recompute

# Examples that CI tries must not change from run to run; a developer's machine tries new ones each time.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# Tests have small tensors. What is made again in backward shall be made again here, too.
recompute.SMALL = 0


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several test processes its share of the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` on a machine without one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    """Forget what other tests compiled: a class of torch compiles a limited number of times."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, such as DistributedDataParallel needs one."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def torchvision_models() -> Iterator[ModuleType]:
    """``torchvision.models``. Ask for this in place of importing torchvision in a test file."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        pytest.skip("torchvision is not installed")
    # The library holds the schemas only while it is alive.
    library = None if _operators_load(Path(spec.origin).parent) else _declare_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = importlib.import_module("torchvision.models")
    yield models
    del library


def _operators_load(package: Path) -> bool:
    """Whether torchvision's compiled operators fit this torch; a CUDA build does not load beside a CPU torch."""
    for file in package.glob("_C*"):
        try:
            torch.ops.load_library(str(file))
        except (OSError, RuntimeError):
            continue
        return True
    return False


def _declare_operators() -> torch.library.Library:
    """Declare the two operators that ``import torchvision`` looks up. Models without them (all classifiers) work."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
