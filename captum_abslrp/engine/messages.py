"""Warnings that point to user code, and names of modules in messages."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

import captum
import torch
from torch import nn

_LIBRARIES = tuple(
    os.path.join(os.path.dirname(os.path.abspath(path)), "")
    for path in (os.path.dirname(__file__), captum.__file__, torch.__file__)
)


def warn(message: str) -> None:
    """Issue a UserWarning at the first caller outside of this package, Captum and PyTorch.

    Args:
        message: the problem and its remedy.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as seen:
        ...     warnings.simplefilter("always")
        ...     warn("Look at the input.")
        >>> str(seen[0].message)
        'Look at the input.'
    """
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)


def place(path: str, module: nn.Module | None) -> str:
    """Describe a module by its path and type, for messages."""
    where = f"`{path}`" if path else "the model itself"
    return where if module is None else f"{where} ({type(module).__name__})"
