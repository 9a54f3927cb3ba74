"""The exceptions of fakequant.

::

    FakeQuantError
    ├── InvalidValueError (ValueError)        an argument of the right type with a wrong value
    ├── InvalidTypeError (TypeError)          an argument of the wrong type
    ├── RecipeError (ValueError)              a rule that matches nothing, an unknown recipe
    ├── CalibrationError (RuntimeError)       a quantizer without data, without a call, with NaN or Inf
    ├── CheckpointError (RuntimeError)        an amax file that does not fit the model
    ├── TrainingError (RuntimeError)          a training that is set up wrongly, or goes wrong
    ├── ExportError (RuntimeError)            a model that cannot become a Q/DQ file; nothing was written
    ├── ValidationError (RuntimeError)        a file that cannot be read, run or compared
    └── MissingDependencyError (ImportError)  an extra that is not installed; the message has the command

Each also derives from the built-in exception named in brackets, so code that
catches ``ValueError`` or ``TypeError`` goes on working.
"""


class FakeQuantError(Exception):
    """Base of every exception that fakequant raises on purpose."""


class InvalidValueError(FakeQuantError, ValueError):
    """An argument of the right type whose value is not allowed."""


class InvalidTypeError(FakeQuantError, TypeError):
    """An argument of a type that is not accepted."""


class RecipeError(FakeQuantError, ValueError):
    """A recipe that does not fit the model: unknown name, or a rule that matches nothing."""


class CalibrationError(FakeQuantError, RuntimeError):
    """A range that cannot be computed; names every quantizer concerned and the reason."""


class CheckpointError(FakeQuantError, RuntimeError):
    """A file of ranges that does not fit the model."""


class TrainingError(FakeQuantError, RuntimeError):
    """A training that is set up wrongly, or goes wrong; names each layer concerned."""


class ExportError(FakeQuantError, RuntimeError):
    """A model that cannot be exported; no file was written."""


class ValidationError(FakeQuantError, RuntimeError):
    """An ONNX file that cannot be read, run, or compared with the model."""


class MissingDependencyError(FakeQuantError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        """Say which package is missing and the command that installs it."""
        super().__init__(f"{package} is not installed. Run: pip install 'fakequant[{extra}]'")
