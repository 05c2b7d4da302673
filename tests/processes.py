"""Processes of their own without the seconds that loading torch takes: forked from one that has loaded it.

They share nothing with the tests: the one they are forked from is started for them, and only loads torch and the
package, without its extension. For what has to start as a user starts it there is ``subprocess``.
"""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

STREAMS = ("stdout", "stderr")


class Forked:
    """Runs a Python program under an environment, in a session of its own; what it writes is collected in files."""

    def __init__(self, code, environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sfpk_kernels"])
        self._folder = tempfile.TemporaryDirectory()
        self._process = context.Process(target=_run, args=(code, environment, self._folder.name))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout=120):
        """(exit code, stdout, stderr), once it has ended; killed if it does not."""
        self._process.join(timeout)
        ended = self._process.exitcode is not None
        if not ended:
            self._process.kill()
            self._process.join()
        said = [path.read_text() if path.exists() else "" for path in map(Path(self._folder.name).joinpath, STREAMS)]
        assert ended, f"not ended after {timeout} s; it wrote {said}"
        return self._process.exitcode, *said


def python(code, timeout=120, **environment):
    """What a program prints, which has to succeed, under changes of the environment: None takes a variable away."""
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    exitcode, text, errors = Forked(code, environment).wait(timeout)
    assert exitcode == 0, errors[-3000:]
    return text


def module(name, *arguments, timeout=300, **environment):
    """``python -m name arguments``."""
    code = f"import runpy, sys\nsys.argv[1:] = {arguments!r}\nrunpy.run_module({name!r}, run_name='__main__')"
    return python(code, timeout, **environment)


def _run(code, environment, folder):
    os.setsid()
    for number, name in enumerate(STREAMS, 1):
        with open(os.path.join(folder, name), "wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))  # not of a test's capture
    os.environ.clear()
    os.environ.update(environment)
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})
