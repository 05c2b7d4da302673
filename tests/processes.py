"""Processes of their own without the seconds that loading torch takes: forked from one that has loaded it.

They share nothing with the tests: the one they are forked from is started for them, and only loads torch and the
package, without its extension. For what has to start as a user starts it there is ``subprocess``.
"""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path


class Forked:
    """Runs a Python program under an environment, in a session of its own; what it writes is collected in a file."""

    def __init__(self, code, environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sfpk_kernels"])
        handle, self._said = tempfile.mkstemp()
        os.close(handle)
        self._process = context.Process(target=_run, args=(code, environment, self._said))
        self._process.start()
        self.pid = self._process.pid

    def output(self, timeout=120):
        """What it wrote to stdout and stderr, once it has ended."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it has not ended"
        said = Path(self._said)
        text = said.read_text() if said.exists() else ""
        said.unlink(missing_ok=True)
        return text

    @property
    def exitcode(self):
        return self._process.exitcode


def python(code, **environment):
    """What a program prints under this environment, which has to succeed."""
    process = Forked(code, {**os.environ, **environment})
    text = process.output()
    assert process.exitcode == 0, text
    return text


def _run(code, environment, said):
    os.setsid()
    with open(said, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))  # not of a test's capture
    os.environ.clear()
    os.environ.update(environment)
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})
