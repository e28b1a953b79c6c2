"""The errors and warnings of this package.

Every error is a :class:`MIPINError`, and also the built-in error that a user of Captum expects::

    MIPINError
    ├── CaptureError (RuntimeError)                           the model has no usable graph
    │   ├── TrainingModeError                                 the model is in training mode
    │   └── UnsupportedOperationError (NotImplementedError)   an operation has no rule
    ├── RuleError (ValueError)                                a rule cannot be registered
    ├── InputError (AssertionError, ValueError)               inputs or options are wrong
    │   └── ArgumentError (TypeError)                         a call has other arguments
    ├── TargetError (AssertionError, ValueError)              a target does not fit the output
    │   └── TargetRangeError (IndexError)                     a target's index is out of range
    ├── NotFittedError (ValueError)                           fit has to be called first
    ├── FitError (ValueError)                                 the data for fit is wrong
    ├── ModelChangedError (RuntimeError)                      the model is not the one fitted to
    ├── MissingNameError (AttributeError, KeyError)           an object has no such name
    └── InverseFileError (ValueError)                         a file is not a saved inverse
        └── MissingFileError (FileNotFoundError)              there is no such file

Each message has three parts: what was found, what was expected, and what to do.
"""


class MIPINError(Exception):
    """Base class of every error of this package.

    Examples:
        >>> import torch
        >>> from captum_mipin import check
        >>> try:
        ...     check(torch.nn.Linear(3, 2), torch.rand(1, 4))
        ... except MIPINError as error:
        ...     print(type(error).__name__)
        CaptureError
    """


class CaptureError(MIPINError, RuntimeError):
    """The model cannot be turned into a graph of operations.

    Examples:
        >>> import torch
        >>> from captum_mipin import check
        >>> check(torch.nn.Linear(3, 2), torch.rand(1, 4))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.CaptureError: ...
    """


class TrainingModeError(CaptureError):
    """The model or one of its modules is in training mode: call ``model.eval()``.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> inverse = InverseNetwork(torch.nn.Dropout())
        >>> inverse.fit(torch.rand(9, 3))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.TrainingModeError: ...
    """


class UnsupportedOperationError(CaptureError, NotImplementedError):
    """The model uses an operation without a rule: see :func:`captum_mipin.register_rule`.

    Examples:
        >>> issubclass(UnsupportedOperationError, (CaptureError, NotImplementedError))
        True
    """


class RuleError(MIPINError, ValueError):
    """A rule cannot be registered, or computes another value than its operation.

    Examples:
        >>> from captum_mipin import register_rule
        >>> register_rule("aten::relu", None)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.RuleError: ...
    """


class InputError(MIPINError, AssertionError, ValueError):
    """Inputs have the wrong type, shape, dtype or device, are empty, or contain NaN or Inf.

    Also raised for options that do not exist, or that cannot be combined.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
        >>> InverseNetwork(model, ridge=-1)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.InputError: ...
    """


class ArgumentError(InputError, TypeError):
    """A call has arguments that do not exist, or too few or too many of them.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> InverseNetwork(torch.nn.Linear(3, 2), rigde=1)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.ArgumentError: ...
    """


class MissingNameError(MIPINError, AttributeError, KeyError):
    """An object has no attribute, method or entry with this name.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> InverseNetwork(torch.nn.Linear(3, 2)).attribute  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.MissingNameError: ...
    """

    __str__ = Exception.__str__  # that of KeyError puts the message into quotes


class TargetError(MIPINError, AssertionError, ValueError):
    """A target does not fit the model's output.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
        >>> inverse = InverseNetwork(model)
        >>> inverse.fit(torch.randn(9, 3), targets=(0, 1))  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.TargetError: ...
    """


class TargetRangeError(TargetError, IndexError):
    """The index of a target is outside the model's output.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
        >>> inverse = InverseNetwork(model)
        >>> inverse.fit(torch.randn(9, 3), targets=2)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.TargetRangeError: ...
    """


class NotFittedError(MIPINError, ValueError):
    """No inverse has been fitted for this class or layer: call ``fit`` first.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
        >>> inverse = InverseNetwork(model)
        >>> inverse.source_signal(torch.rand(1, 3), target=0)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.NotFittedError: ...
    """


class FitError(MIPINError, ValueError):
    """The data passed to ``fit`` cannot be used.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
        >>> inverse = InverseNetwork(model)
        >>> inverse.fit([], targets=0)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.FitError: ...
    """


class ModelChangedError(MIPINError, RuntimeError):
    """The model differs from the model of the fit, or its weights have changed since the fit.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
        >>> inverse = InverseNetwork(model)
        >>> _ = inverse.fit(torch.randn(9, 3), targets=0, progress=False)
        >>> _ = model[0].weight.data.mul_(2)
        >>> inverse.source_signal(torch.rand(1, 3), target=0)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.ModelChangedError: ...
    """


class ModelChangedWarning(UserWarning):
    """The model's weights have changed since the fit, and ``changed="warn"`` was chosen.

    Examples:
        >>> import warnings
        >>> warnings.simplefilter("ignore", ModelChangedWarning)
    """


class DataWarning(UserWarning):
    """A fit has very few examples, inputs are scaled differently than in the fit, or a map is 0.

    Examples:
        >>> import warnings
        >>> warnings.simplefilter("error", DataWarning)
    """


class DenseHeadWarning(UserWarning):
    """A map for photographs is made at a dense head, where other methods find objects better.

    Examples:
        >>> import warnings
        >>> warnings.simplefilter("ignore", DenseHeadWarning)
    """


class LogitsWarning(UserWarning):
    """The model ends in a sigmoid or softmax: the warning says whether logits are explained.

    Methods that start from logits explain those below it. Gradients are those of its result.

    Examples:
        >>> import warnings
        >>> warnings.simplefilter("ignore", LogitsWarning)
    """


class ChanceWarning(UserWarning):
    """A random map scores above 0.9, so a high score is no evidence of a good method.

    Examples:
        >>> import warnings
        >>> warnings.simplefilter("error", ChanceWarning)
    """


class InverseFileError(MIPINError, ValueError):
    """A file is not a saved inverse, or it is damaged.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
        >>> inverse = InverseNetwork(model)
        >>> import tempfile
        >>> file = tempfile.NamedTemporaryFile()
        >>> InverseNetwork.load(file.name, model)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.InverseFileError: ...
    """


class MissingFileError(InverseFileError, FileNotFoundError):
    """There is no file with this path, or it is a folder.

    Examples:
        >>> import torch
        >>> from captum_mipin import InverseNetwork
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
        >>> InverseNetwork.load("nowhere", model)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        captum_mipin.errors.MissingFileError: ...
    """
