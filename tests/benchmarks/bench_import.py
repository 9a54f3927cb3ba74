"""What ``import fakequant`` costs on top of torch."""

import subprocess
import sys

_CODE = (
    "import time, sys, torch; t = time.perf_counter(); import fakequant; "
    "print(time.perf_counter() - t, 'onnx' in sys.modules)"
)


def main() -> None:
    """Five fresh interpreters; the least counts."""
    runs = [subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True) for _ in range(5)]
    seconds = min(float(run.stdout.split()[0]) for run in runs)
    loads_onnx = runs[0].stdout.split()[1]
    print(f"\nimport fakequant on top of torch: {seconds:.3f} s; onnx imported: {loads_onnx}")


if __name__ == "__main__":
    main()
