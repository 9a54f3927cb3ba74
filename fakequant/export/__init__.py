"""Q/DQ ONNX files: export for a target, checks against its rules, validation against the torch model.

================  =====================================================================
to_onnx           export_onnx: trace, rewrite, write
exportable        what a model must be before it can be exported
trace             the graph as torch traces it, with a marker for each quantizer
torchscript       the same by torch's older exporter, for opsets below 18
trace_recurrent   recurrent layers while torch traces, packed sequences as padded ones
recurrent_ops     LSTM, GRU and RNN as ops that both exporters translate
weights_on_grids  the weights of recurrent layers, as floats on their grids
tensor_inputs     the inputs of the graph, and their dynamic dimensions
write             a whole and valid file, or none
targets           what each runtime wants; one file a target
rules             rewrites of the graph; one a file
graph             reading a Q/DQ graph
export_report     what a file holds
load              reading a file of any origin
checks            what a target refuses or runs slowly; one check a rule
check_onnx        check_onnx: the file against the rules of a target
runtime           ONNX Runtime sessions
tensorrt_engine   engines of the tensorrt package
engine_layers     what TensorRT says of the layers of an engine
open_session      open_session: the one or the other
tensorrt_command  tensorrt_command: the trtexec line for a file
cut_graph         a graph cut at its quantizers
stretches         what computes a tensor of a cut graph
torch_run         a batch in the torch model, with its codes
difference        largest difference, SQNR, share
validate          validate_onnx: the file against the torch model
compare           compare: the same, layer by layer
compare_report    the table of it, and the first divergence
kernels           which kernels of ONNX Runtime an op can become
match_kernels     which kernel runs which node of a file
grid              how a tensor is quantized, and as which type it runs
quantized_edges   what is in front of and behind an op
reasons           why an op has no integer kernel; one function a reason
inspect_onnx      inspect_onnx: what ONNX Runtime makes of each op
================  =====================================================================
"""

try:
    import onnx  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
except ImportError as error:
    from fakequant.errors import MissingDependencyError

    raise MissingDependencyError(error.name or "onnx", "onnx") from error

from fakequant.export.check_onnx import CheckReport, check_onnx
from fakequant.export.checks import Finding, Severity
from fakequant.export.compare import compare
from fakequant.export.compare_report import ComparedLayer, CompareReport
from fakequant.export.export_report import ExportReport
from fakequant.export.inspect_onnx import InspectedOp, InspectReport, inspect_onnx
from fakequant.export.open_session import open_session
from fakequant.export.runtime import Session
from fakequant.export.tensorrt_command import tensorrt_command
from fakequant.export.tensorrt_engine import TensorrtEngine
from fakequant.export.to_onnx import export_onnx
from fakequant.export.validate import Comparison, ValidationReport, validate_onnx

__all__ = [
    "CheckReport",
    "CompareReport",
    "ComparedLayer",
    "Comparison",
    "ExportReport",
    "Finding",
    "InspectReport",
    "InspectedOp",
    "Session",
    "Severity",
    "TensorrtEngine",
    "ValidationReport",
    "check_onnx",
    "compare",
    "export_onnx",
    "inspect_onnx",
    "open_session",
    "tensorrt_command",
    "validate_onnx",
]
