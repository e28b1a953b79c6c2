"""What this package raises; every error is also the built-in one a Captum user would expect."""


class MIPINError(Exception):
    """Base of every error of this package."""


class CaptureError(MIPINError, RuntimeError):
    """The model cannot be turned into a graph of operations."""


class TrainingModeError(CaptureError):
    """The model, or a part of it, is in training mode."""


class UnsupportedOperationError(CaptureError, NotImplementedError):
    """The model uses an operation that no rule covers."""


class RuleError(MIPINError, ValueError):
    """A rule that cannot be registered, or that computes something else than its operation."""


class InputError(MIPINError, AssertionError, ValueError):
    """Inputs of the wrong kind: type, shape, dtype, device, empty, not finite."""


class TargetError(MIPINError, AssertionError, ValueError):
    """A target that does not fit the model's output."""


class TargetRangeError(TargetError, IndexError):
    """A target outside the model's output."""


class NotFittedError(MIPINError, ValueError):
    """No inverse has been fitted yet, or none for this class or layer."""


class FitError(MIPINError, ValueError):
    """The data given to ``fit`` cannot be used."""


class ModelChangedError(MIPINError, RuntimeError):
    """The model is not the one, or no longer the one, that the inverse was fitted to."""


class ModelChangedWarning(UserWarning):
    """The model's weights are no longer those that the inverse was fitted to, which ``changed="warn"`` allows."""


class InverseFileError(MIPINError, ValueError):
    """A file that is not, or no longer, a saved inverse network."""
