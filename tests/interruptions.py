"""Interruptions at every moment of a piece of work."""

import inspect
import os
import sys

# Tracing of Python 3.10 ends a generator that is interrupted as it goes on, without its handlers; signals never do.
UNTOUCHED = inspect.CO_GENERATOR if sys.version_info < (3, 11) else 0


def every_moment(work, files, kind=KeyboardInterrupt, step=1):
    """Run ``work`` again and again, interrupted at every call and line of ``files`` in turn.

    Args:
        work: called without arguments for each of them.
        files: the source files whose moments count.
        kind: raised there, as a signal handler would.
        step: only every so many moments.

    Yields:
        What came out of ``work``, until a run of it came to its end.
    """
    assert all(os.path.isfile(name) for name in files), "a file has moved"
    names, moment = {os.path.realpath(name) for name in files}, 1
    known = {}
    while True:
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            name = frame.f_code.co_filename
            if name not in known:
                known[name] = os.path.realpath(name) in names
            if not known[name]:
                return None
            if event == "line" or (event == "call" and not frame.f_code.co_flags & UNTOUCHED):
                count += 1
                if count == moment:  # noqa: B023
                    raise kind(f"{os.path.basename(name)}:{frame.f_lineno} {event}")
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            work()
        except BaseException as error:
            sys.settrace(before)
            yield error
            del error
        else:
            sys.settrace(before)
            assert count < moment, "the interruption was lost"
            return
        moment += step
