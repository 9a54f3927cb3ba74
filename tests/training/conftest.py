"""The networks of these tests, as a module that pickles find again."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

NAME = "fakequant_test_training_networks"

collect_ignore = ["two_processes.py"]  # a script, which imports networks.py as its neighbour


@pytest.fixture(scope="session")
def networks() -> ModuleType:
    """``networks.py``."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, Path(__file__).with_name("networks.py"))
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]
