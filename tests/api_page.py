"""Write docs/api.md: every public name with its signature and docstring, in Markdown that any code host shows.

python -m tests.api_page
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import stg_hooks as stg
from stg_hooks import adapters, errors
from stg_hooks.guidance.trace import Stats, Trace, TraceRow
from stg_hooks.study.table import LayerTable

FILE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
INTRODUCTION = """\
# API

`import stg_hooks as stg`. Written from the docstrings by `python -m tests.api_page`. Shapes: B samples, C channels, F
frames, H and W height and width. Which error means what, and its cure: [errors](errors.md).
"""
ERRORS = sorted(name for name in stg.__all__ if hasattr(errors, name))
SECTIONS: dict[str, list[str]] = {
    "Guide": ["apply", "Guider", "skip", "check", "combine"],
    "In a host": ["Predictor", "modular.SkipGuidance", "k_diffusion.callback", "k_diffusion.apply_to_cfg"],
    "Settings": ["Branch", "Step", "LayerCall"],
    "Rules": ["rules", *(f"rules.{name}" for name in stg.rules.__all__)],
    "Look": ["layers", "LayerTable", "Stats", "Trace", "TraceRow"],
    "Measure": ["profile", "sweep", "report", "results", "results.Profile", "results.Sweep"],
    "Errors": ERRORS,
    "Facts about models": ["adapters", *(f"adapters.{name}" for name in adapters.__all__)],
}
"""What the page shows, in its order: names below `stg`, and what its functions return (`RETURNED`)."""
RETURNED: dict[str, Any] = {"LayerTable": LayerTable, "Stats": Stats, "Trace": Trace, "TraceRow": TraceRow}
GIVEN = {*RETURNED, "LayerCall", "results.Profile", "results.Sweep"}
"""What users are given and do not make."""
DATA = {
    "adapters.ATTENTION": "Names of classes that compute attention, where their own name does not say so.",
    "adapters.ATTENTION_FUNCTIONS": "Attention functions that torch cannot look into: the `Layout` of their arguments.",
    "adapters.KIN": "Classes of other code bases, and the class of diffusers whose published settings hold for them.",
    "adapters.OUTPUTS": "By class of model: the names of what it predicts, where it predicts several things.",
    "adapters.PUBLISHED": "The published settings, each with its source ([recipes](recipes.md)).",
    "adapters.STREAMS": "By class of block: the arguments that stand in for the tensors that it returns.",
    "adapters.TEMPORAL": "By class of model: parts of the names of its attention across frames.",
    "rules.Rule": "The type of a rule: a function of cond, uncond or `None`, the weighted differences, the CFG weight.",
}
"""What has no docstring of its own."""
_INTERNAL = {"apply.not_to_be_entered", "Trace.add"}  # for other parts of stg_hooks
_HEADS = ("Args", "Returns", "Raises", "Yields")


def page() -> str:
    """Return the whole page."""
    rows = [
        f"| [`{_shown(name)}`](#{_anchor(name)}) | {summary(name)} |" for names in SECTIONS.values() for name in names
    ]
    parts = [INTRODUCTION, "\n".join(["| name | |", "| --- | --- |", *rows]) + "\n"]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += ["\n".join(_entry(name)).rstrip() + "\n" for name in names]
    return "\n".join(parts)


def find(name: str) -> Any:
    """Look up a name of the page."""
    if name in RETURNED:
        return RETURNED[name]
    first, *rest = name.split(".")
    found: Any = adapters if first == "adapters" else getattr(stg, first)
    for part in rest:
        found = getattr(found, part)
    return found


def _shown(name: str) -> str:
    return name if name in RETURNED else f"stg_hooks.{name}" if name.startswith("adapters") else f"stg.{name}"


def _anchor(name: str) -> str:
    """Return what a code host and the site both make of the heading."""
    return re.sub(r"[^\w-]", "", _shown(name).lower())


def summary(name: str) -> str:
    """Return what a name is, in a line or two."""
    text = DATA.get(name) or (inspect.getdoc(find(name)) or "").split("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|")  # also in code, a bar would begin the next cell


def _entry(name: str) -> Iterator[str]:
    what, shown = find(name), _shown(name)
    yield f"### {shown}\n"
    if name in DATA:
        yield DATA[name]
        return
    is_error = inspect.isclass(what) and issubclass(what, Exception)
    if not (is_error or isinstance(what, ModuleType) or name in GIVEN):
        yield from _signature(shown, what)
    yield from _markdown(inspect.getdoc(what) or "")
    if is_error:
        yield f"\nA kind of {' and '.join(f'`{base.__name__}`' for base in what.__bases__)}."
    elif inspect.isclass(what):
        yield from _class(what)


def _class(what: type) -> Iterator[str]:
    constructor = vars(what).get("__init__")
    if constructor is not None and "__dataclass_fields__" not in vars(what):
        text = inspect.getdoc(constructor) or ""
        sections = re.search(rf"^(?:{'|'.join(_HEADS)}):$", text, re.M)
        yield from ["", *_markdown(text[sections.start() :] if sections else "")]
    members = [f"- `.{key}`: {text}" for key, text in _attributes(what)]
    for key, value in vars(what).items():
        if (key.startswith("_") and key != "__call__") or f"{what.__name__}.{key}" in _INTERNAL:
            continue
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        text = inspect.getdoc(function) if inspect.isfunction(function) else None
        if not text:
            continue
        called = "" if isinstance(value, property) else f"({_names(function)})"
        members.append(
            f"- `{'' if key == '__call__' else f'.{key}'}{called}`: {' '.join(text.splitlines()[0].split())}"
        )
    if members:
        yield "\n".join(["\n**Members**\n", *members])


def _attributes(what: type) -> Iterator[tuple[str, str]]:
    """Find the attributes that a class states, and the texts below them."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(what))).body
    assert isinstance(tree, ast.ClassDef)
    for line, below in itertools.pairwise(tree.body):
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(line.target, ast.Name)
            yield line.target.id, " ".join(str(below.value.value).split())


def _names(function: Any) -> str:
    """Return the names of what is passed, as they stand in a call."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = list(inspect.signature(function).parameters.values())
    return ", ".join(f"{stars.get(p.kind, '')}{p.name}" for p in parameters if p.name not in ("self", "cls"))


def _signature(shown: str, what: Any) -> Iterator[str]:
    signature = inspect.signature(what)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    line = f"{shown}{signature.replace(parameters=plain, return_annotation=signature.empty)}"
    if len(line) > 110:
        opening, inside = line.split("(", 1)
        line = f"{opening}(\n" + "".join(f"    {part},\n" for part in _parts(inside[:-1])) + ")"
    yield f"```text\n{line}\n```\n"


def _parts(text: str) -> list[str]:
    """Split at the commas that stand in no brackets, and fill lines."""
    parts = re.split(r", (?![^(\[{]*[)\]}])", text)
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < 100:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return lines


def _markdown(text: str) -> Iterator[str]:
    """Turn the sections of a docstring into lists, and its formulas into blocks."""
    head, items = "", list[str]()
    for line in text.splitlines():
        if line.rstrip(":") in _HEADS and line.endswith(":"):
            yield from _items(head, items)
            head, items = line.rstrip(":"), []
        elif head and line.startswith("    "):
            items.append(line[4:])
        elif head and not line:
            items.append(line)
        else:
            yield from _items(head, items)
            head, items = "", []
            yield line
    yield from _items(head, items)


def _items(head: str, lines: list[str]) -> Iterator[str]:
    if not head:
        return
    text = "\n".join(lines).strip()
    yield f"**{head}**\n"
    entries = re.split(r"\n(?! )", text)
    for entry in entries if head != "Returns" else [text]:
        words = " ".join(entry.split())
        named = re.match(r"([*A-Za-z_.]+): (.*)", words) if head != "Returns" else None
        yield f"- `{named[1]}`: {named[2]}" if named else f"- {words}" if head != "Returns" else words
    yield ""


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
