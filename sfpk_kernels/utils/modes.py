"""Dispatch modes of torch that end where they began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch.utils import _python_dispatch

Mode = TypeVar("Mode")

# What torch knows beside the stack (a version has some of them), and where it tells the compiler of the last one.
_FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)
_TELL = "set_is_in_mode_without_ignore_compile_internals"


@contextmanager
def within(mode: AbstractContextManager[Mode]) -> Iterator[Mode]:
    """``with mode``, of which nothing stays where an interruption comes while it begins or ends.

    torch does both in several lines of Python; one left on slows down every later operator of the process, and
    nothing is compiled any more.
    """
    depth = torch._C._len_torch_dispatch_stack()
    flags = {name: getattr(_python_dispatch, name) for name in _FLAGS if hasattr(_python_dispatch, name)}
    try:
        with mode as entered:
            yield entered
    finally:
        while torch._C._len_torch_dispatch_stack() > depth:
            _python_dispatch._pop_mode()
        for name, value in flags.items():
            setattr(_python_dispatch, name, value)
        if _FLAGS[-1] in flags and hasattr(_python_dispatch, _TELL):
            getattr(_python_dispatch, _TELL)(flags[_FLAGS[-1]])
