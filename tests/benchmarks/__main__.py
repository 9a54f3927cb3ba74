"""``python tests/benchmarks [name ...]``: run all benchmarks, or those named (calibration, operator, ...)."""

import runpy
import sys
from pathlib import Path

_ALL = (
    "import",
    "operator",
    "calibration",
    "distributed",
    "call_sites",
    "qat_step",
    "qat_memory",
    "memory",
    "onnxruntime",
    "dynamic",
    "files",
)

if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or _ALL
    sys.argv = sys.argv[:1]
    for name in names:
        runpy.run_path(str(Path(__file__).parent / f"bench_{name}.py"), run_name="__main__")
