"""The family of saved models, ``case`` each of them in turn."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import fakequant as fq
from fakequant.errors import CheckpointError

NAME = "fakequant_test_saved_models"
FILE = Path(__file__).with_name("saved_models.py")

collect_ignore = [FILE.name]


def _saved_models() -> ModuleType:
    """``saved_models.py`` under a name by which the dataclasses in it find themselves."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, FILE)
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``case`` on the whole family."""
    if "case" in metafunc.fixturenames:
        cases = _saved_models().CASES
        metafunc.parametrize("case", cases.values(), ids=cases)


@pytest.fixture(scope="session")
def saved_models() -> ModuleType:
    return _saved_models()


@pytest.fixture
def path(tmp_path) -> Path:
    """Of the file to save to."""
    return tmp_path / "model.safetensors"


@pytest.fixture
def refuses(path, contents) -> Callable[[nn.Module, str], None]:
    """Check that the file is refused with a message, and that the model is what it was."""

    def check(model: nn.Module, match: str) -> None:
        before = contents(model)
        with pytest.raises(CheckpointError, match=match):
            fq.load_quantized(model, path)
        assert contents(model) == before

    return check


@pytest.fixture
def placed(saved_models):
    """A case with everything in it, for tests that need no more than one."""
    return saved_models.CASES["placed"]


@pytest.fixture(scope="session")
def contents() -> Callable[[nn.Module], str]:
    return _contents


def _contents(model: nn.Module) -> str:
    """Return every module as an object, with its attributes, children and hooks, and the values of every tensor."""
    modules = [
        (name, id(module), type(module), {key: _shallow(value) for key, value in vars(module).items()})
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    values = [(key, None if value.is_meta else value.tolist()) for key, value in model.state_dict().items()]
    return str((modules, values))


def _shallow(value: object) -> object:
    return [(key, id(of)) for key, of in value.items()] if isinstance(value, dict) else id(value)
