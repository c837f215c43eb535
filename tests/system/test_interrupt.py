"""A signal stops the program wherever it arrives."""

from __future__ import annotations

import subprocess
import sys

LOST = """
import os, signal, time
from distill.system import interrupt

class Object:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

interrupt.install()
try:
    Object()
    time.sleep(20)
except interrupt.Interrupted as error:
    print("stopped by", error)
"""


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("stopped by SIGTERM\n", "", 0)


def test_other_errors_of_destructors_are_still_printed() -> None:
    program = LOST.replace("os.kill(os.getpid(), signal.SIGTERM)", "raise ValueError('theirs')").replace("20", "0")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert "ValueError: theirs" in done.stderr and done.stdout == ""
