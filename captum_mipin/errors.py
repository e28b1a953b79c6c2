"""The errors and warnings of this package.

Every error is a :class:`MIPINError`, and also the built-in error that a user of Captum expects::

    MIPINError
    ├── CaptureError (RuntimeError)                           the model has no usable graph
    │   ├── TrainingModeError                                 the model is in training mode
    │   └── UnsupportedOperationError (NotImplementedError)   an operation has no rule
    ├── RuleError (ValueError)                                a rule cannot be registered
    ├── InputError (AssertionError, ValueError)               inputs or options are wrong
    ├── TargetError (AssertionError, ValueError)              a target does not fit the output
    │   └── TargetRangeError (IndexError)                     a target's index is out of range
    ├── NotFittedError (ValueError)                           fit has to be called first
    ├── FitError (ValueError)                                 the data for fit is wrong
    ├── ModelChangedError (RuntimeError)                      the model is not the one fitted to
    └── InverseFileError (ValueError)                         a file is not a saved inverse

Each message has three parts: what was found, what was expected, and what to do.
"""


class MIPINError(Exception):
    """Base class of every error of this package."""


class CaptureError(MIPINError, RuntimeError):
    """The model cannot be turned into a graph of operations."""


class TrainingModeError(CaptureError):
    """The model or one of its modules is in training mode: call ``model.eval()``."""


class UnsupportedOperationError(CaptureError, NotImplementedError):
    """The model uses an operation without a rule: see :func:`captum_mipin.register_rule`."""


class RuleError(MIPINError, ValueError):
    """A rule cannot be registered, or its result differs from that of its operation."""


class InputError(MIPINError, AssertionError, ValueError):
    """Inputs have the wrong type, shape, dtype or device, are empty, or contain NaN or Inf.

    Also raised for options that do not exist, or that cannot be combined.
    """


class TargetError(MIPINError, AssertionError, ValueError):
    """A target does not fit the model's output."""


class TargetRangeError(TargetError, IndexError):
    """The index of a target is outside the model's output."""


class NotFittedError(MIPINError, ValueError):
    """No inverse has been fitted for this class or layer: call ``fit`` first."""


class FitError(MIPINError, ValueError):
    """The data passed to ``fit`` cannot be used."""


class ModelChangedError(MIPINError, RuntimeError):
    """The model is not the one the inverse was fitted to, or its weights have changed since."""


class ModelChangedWarning(UserWarning):
    """The model's weights have changed since the fit, and ``changed="warn"`` was chosen."""


class ChanceWarning(UserWarning):
    """A random map scores above 0.9, so a high score is no evidence of a good method."""


class InverseFileError(MIPINError, ValueError):
    """A file is not a saved inverse, or it is damaged."""
