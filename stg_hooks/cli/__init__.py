"""The command `stg-hooks`."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: with status 0 (done), 1 (failed), 2 (what was asked for cannot be done) or 130 (interrupted).
    """
    # Not as an exception: one that is raised within an import may come out of it as another error.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _leave)
    try:
        importlib.import_module("rich")  # its parts load later, where what is missing would be told less well
        app = importlib.import_module("stg_hooks.cli.app").app
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"stg-hooks: {package} is not installed: pip install typer rich")
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    finally:
        # The work is over: an interrupt while Python ends would kill it without a line.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


_LINE = "stg-hooks: interrupted."


def _leave(*_: object) -> None:
    os.write(2, f"{_LINE}\n".encode())  # what buffers sys.stderr may be in the middle of something
    os._exit(130)


def _interrupted() -> int:
    print(_LINE, file=sys.stderr)  # noqa: T201  typer may not have been loaded
    return 130
