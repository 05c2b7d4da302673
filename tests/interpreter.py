"""Triton's interpreter without the work it repeats: half the time of small kernels, the same results."""

import functools
from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def languages(function):
    """The modules of Triton's language that a kernel, or a function of one, can see."""
    seen = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    return tuple({id(module): module for module in seen}.values())


def patch_once():
    """A function called by a kernel finds the language patched, by the launch or by an earlier call.

    The interpreter goes through all of its members again, and finds none left that is built in.
    """
    patch = interpreter._patch_lang

    @functools.wraps(patch)
    def quick(function):
        if any(tl.core.is_builtin(module.load) for module in languages(function)) or not languages(function):
            return patch(function)
        return SimpleNamespace(restore=lambda: None)  # nothing was changed

    interpreter._patch_lang = quick
