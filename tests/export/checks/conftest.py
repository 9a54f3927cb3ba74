"""Graphs as ONNX text, written to a file and checked as any file is."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest

import fakequant as fq
from fakequant.export import CheckReport

# Tests are imported without their folder on the path; the tables of graphs are modules in it.
sys.path.insert(0, str(Path(__file__).parent))

_REPEATED = re.compile(r"\[([\d, ]+)\] (\w+) = \{(\S+)\.\.\.\}")


def parsed(body: str, opset: int = 19) -> onnx.ModelProto:
    """Return a model from the text of a graph, in which ``{0.5...}`` fills an initializer with one value."""

    def repeat(match: re.Match[str]) -> str:
        sizes, name, value = match.groups()
        count = 1
        for size in sizes.split(","):
            count *= int(size)
        return f"[{sizes}] {name} = {{{', '.join([value] * count)}}}"

    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "mine" : 1]>'
    return onnx.parser.parse_model(f"{header} {_REPEATED.sub(repeat, body)}")


@pytest.fixture
def check(tmp_path) -> Callable[..., CheckReport]:
    """Check the text of a graph."""

    def run(body: str, opset: int = 19, target: str = "tensorrt") -> CheckReport:
        onnx.save(parsed(body, opset), tmp_path / "model.onnx")
        return fq.check_onnx(tmp_path / "model.onnx", target=target)

    return run


@pytest.fixture(name="parsed")
def _parsed() -> Callable[..., onnx.ModelProto]:
    return parsed
