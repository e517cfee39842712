"""The errors of the package, all below one root.

    GroupNormError (ValueError)
    ├── ShapeError         a shape does not fit, or num_groups does not divide the channels (also a RuntimeError)
    ├── DtypeError         an array's type is not one of ours (also a TypeError and a RuntimeError)
    ├── OptionError        an option has a value that is not known: layout, activation, eps, num_groups (also a
    │                      RuntimeError)
    ├── EngineError        the engine that `impl` names cannot take this problem
    └── FileError          a file cannot be read or written as asked

Each message says what was got, what was expected and what to do. PyTorch's own group_norm raises RuntimeError for bad
arguments, and code that was written for it may catch that.
"""

__all__ = ["DtypeError", "EngineError", "FileError", "GroupNormError", "OptionError", "ShapeError"]


class GroupNormError(ValueError):
    """Root of every error that this package raises on purpose."""


class ShapeError(GroupNormError, RuntimeError):
    """A shape does not fit the others, or the number of groups."""


class DtypeError(GroupNormError, TypeError, RuntimeError):
    """An array has a type that group normalization is not defined for here."""


class OptionError(GroupNormError, RuntimeError):
    """An option has a value that is not known."""


class EngineError(GroupNormError):
    """The engine that was asked for cannot take this problem, or is not installed."""


class FileError(GroupNormError):
    """A file cannot be read or written as asked."""
