"""What the files of six networks hold and how far they are from float32 torch: the bars of deployment but for times.

Random weights with settled statistics, batch 2; names as arguments pick networks.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench_onnxruntime import NETWORKS, model_and_input

import fakequant as fq

_FILES = (("tensorrt", "float32"), ("tensorrt", "float16"), ("onnxruntime", "float32"))


def main() -> None:
    """Export each network for both targets, check, inspect and validate the files, and print a line a file."""
    for name in [name for name in sys.argv[1:] if name in NETWORKS] or NETWORKS:
        model, x = model_and_input(name, 2)
        size = sum(p.numel() for p in model.parameters()) * 4
        fq.quantize(model, example_inputs=(x,))
        fq.calibrate(model, [x], progress=False)
        for target, float_dtype in _FILES:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "m.onnx"
                written = fq.export_onnx(model, (x,), path, target=target, float_dtype=float_dtype)
                found = fq.validate_onnx(path, model, [x])
                words = [f"{written.size / size:.3f} of the float weights", f"{found.simulated.max_steps} steps"]
                words.append(
                    f"{found.simulated.moved:.4%} of the codes moved, {found.simulated.sqnr_db:.0f} dB end to end"
                )
                words.append(f"optimized: {found.optimized.max_steps} steps, {found.optimized.sqnr_db:.0f} dB")
                if target == "tensorrt":
                    words.append(f"{len(fq.check_onnx(path).findings)} findings")
                else:
                    kernels = Counter(op.kernel for op in fq.inspect_onnx(path).integer_ops)
                    words.append(", ".join(f"{count} {kernel}" for kernel, count in kernels.items()))
            print(f"{name:<20}{target:<13}{float_dtype:<9}{'; '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
