"""Fill in what the snippets of docs/errors.md print, by running them: the text block below a snippet is its message.

python -m tests.errors_page
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
import textwrap
import traceback
import warnings
from pathlib import Path
from typing import Any

import stg_hooks as stg

FILE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
SNIPPET = re.compile(r"(```python\n(?P<code>.*?)```\n)(?P<text>\n```text\n.*?```\n)?", re.S)


def filled(page: str) -> str:
    """Return the page with the messages as they are now. The snippets run in their order, with the same names.

    Raises:
        AssertionError: a snippet has a message and should have none, or the other way round.
    """
    names: dict[str, Any] = {}
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "matplotlib"}

    def fill(found: re.Match[str]) -> str:
        message = run(found["code"], names)
        assert bool(message) == bool(found["text"]), f"{found['code']}\n{message or 'no message'}"
        return f"{found[1]}\n```text\n{message}\n```\n" if message else found[0]

    try:
        for name in modules:  # the page does as if it were not installed
            del sys.modules[name]
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            return SNIPPET.sub(fill, page)
    finally:
        sys.modules.pop("matplotlib", None)
        sys.modules.update(modules)


def run(code: str, names: dict[str, Any]) -> str:
    """Run a snippet; return the error or the warning of ours that it ends in, wrapped."""
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            exec(compile(code, "errors.md", "exec"), names)
        except stg.StgError as error:
            traceback.clear_frames(error.__traceback__)
            return _wrapped(f"{type(error).__name__}: {error}")
    told = list(dict.fromkeys(f"StgWarning: {w.message}" for w in caught if issubclass(w.category, stg.StgWarning)))
    return "\n".join(map(_wrapped, told))


def _wrapped(text: str) -> str:
    lines = re.sub(r" at 0x[0-9a-f]+", "", text).splitlines()
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 110, break_on_hyphens=False) or [""])


if __name__ == "__main__":
    FILE.write_text(filled(FILE.read_text(encoding="utf-8")), encoding="utf-8")
