"""Programs that are ended in time, with all that they started."""

import os
import signal
import subprocess
import tempfile


def call(command, seconds, cwd=None, env=None, show=False):
    """Run a program; return its exit code (None when its time was over) and what it printed.

    With `show` it prints to our own output instead.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        to = None if show else log
        program = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=to, stderr=to and subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = program.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        log.seek(0)
        return code, log.read()
