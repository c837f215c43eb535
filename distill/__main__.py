"""The program's first lines, `distill` and `python -m distill`: a signal ends it quietly while it is being imported."""

from __future__ import annotations

# Until `_take_signals` has run, Python answers a Ctrl-C with a traceback. So nothing is imported before it but two
# modules that the interpreter has at hand; this also keeps `distill --help` within a tenth of a second.
try:
    import os
    import signal
    import sys
except KeyboardInterrupt:
    raise SystemExit(130) from None


def main() -> None:
    """Run the command line, and exit with its status."""
    _take_signals()
    if sys.platform == "win32":  # there is no fork, no lock of folders, no SIGHUP
        print(
            "distill: Windows itself cannot run it: install WSL2 (`wsl --install`) and distill inside", file=sys.stderr
        )
        raise SystemExit(2)
    from distill import cli

    try:
        cli.main()
    finally:
        _take_signals()  # Python's own end takes a moment, in which an exception would be printed


def _take_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end the program at once, until a command takes them over (`system/interrupt.py`).

    Whoever started it with `nohup`, which ignores SIGHUP, or in the background of a script, does not want it to end.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(signum: int, frame: object) -> None:
    """End without an exception: raised inside an import, it may be lost, printed, or turned into another one."""
    try:
        os.write(2, b"\nstopped\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    main()
