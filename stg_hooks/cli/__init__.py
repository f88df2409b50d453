"""The command `stg-hooks`."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: with status 0 (done), 1 (failed), 2 (what was asked for cannot be done) or 130 (interrupted).
    """
    try:
        importlib.import_module("rich")  # its parts load later, where what is missing would be told less well
        app = importlib.import_module("stg_hooks.cli.app").app
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f'stg-hooks: {package} is not installed: pip install "stg-hooks[cli]"')
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except SystemExit as stop:
        # Of an interrupt before or after a command typer makes the same status, and says nothing.
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            stop.code = _interrupted()
        raise


def _interrupted() -> int:
    print("stg-hooks: interrupted.", file=sys.stderr)  # noqa: T201  rich may not have been loaded
    return 130
