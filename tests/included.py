"""Fill what pages show of other files: the text between two comments, so that code hosts show it as well.

    python -m tests.included

In a page, `<!-- from FILE -->` begins what is shown of a file, and `<!-- end -->` ends it. `FILE:5:` is from line 5 on,
`FILE:5:9` up to line 9. A program is shown as code, a table of Markdown as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INCLUDED = re.compile(
    r"<!-- from (?P<file>[^ :]+)(?::(?P<first>\d+):(?P<last>\d*))? -->\n(?P<text>.*?)<!-- end -->", re.S
)


def filled(page: str) -> str:
    """Return a page with what it shows of other files as they are now."""
    return INCLUDED.sub(_filled, page)


def _filled(found: re.Match[str]) -> str:
    file, first, last = found["file"], found["first"], found["last"]
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    text = "\n".join(lines[int(first or 1) - 1 : int(last) if last else None]).strip("\n")
    # Its tests are those of the file: "py" tells it from the code that is run as the page's own.
    shown = f"```py\n{text}\n```" if file.endswith(".py") else text
    return f"{found[0].splitlines()[0]}\n\n{shown}\n\n<!-- end -->"


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            page.write_text(filled(text), encoding="utf-8")
            print(page.name)
