"""Q/DQ ONNX files: export for a target, and validation against the torch model.

==============  ===================================================================
to_onnx         export_onnx: trace, rewrite, check, write
targets         what each runtime wants; one file a target
rules           rewrites of the graph; one a file
graph           reading a Q/DQ graph
export_report   what a file holds
runtime         ONNX Runtime sessions
cut_graph       a graph cut at its quantizers
validate        validate_onnx: the file against the torch model
==============  ===================================================================
"""

try:
    import onnx  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
except ImportError as error:
    from fakequant.errors import MissingDependencyError

    raise MissingDependencyError(error.name or "onnx", "onnx") from error

from fakequant.export.export_report import ExportReport
from fakequant.export.runtime import Session
from fakequant.export.to_onnx import export_onnx
from fakequant.export.validate import Comparison, ValidationReport, validate_onnx

__all__ = ["Comparison", "ExportReport", "Session", "ValidationReport", "export_onnx", "validate_onnx"]
