"""Importing stg_hooks costs torch and nothing else, and dependencies point one way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What an `import` may bring along besides what `import torch` brings. A lazily loaded part of torch counts as torch.
PROBE = """
import importlib, sys
import torch
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
for name in sorted({module.split(".")[0] for module in set(sys.modules) - before}):
    if name not in sys.stdlib_module_names and not name.startswith("_sysconfigdata"):
        print(name)
"""


def newly_imported(*modules: str, path: Path = ROOT) -> set[str]:
    """List the top-level names from outside the standard library that `modules` load and torch does not."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *modules],
        env=os.environ | {"PYTHONPATH": str(path)},
        cwd=path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules_of(*folders: str) -> list[str]:
    return [name for folder in folders for name, _ in sources(folder)]


def sources(folder: str) -> Iterator[tuple[str, Path]]:
    """Yield (module name, file) for a folder; of the core, what lies in none of its other parts."""
    core = folder == "stg_hooks"
    for file in sorted((ROOT / folder).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if core and parts[1] in PARTS:
            continue
        name = ".".join(parts if core else ("stg_hooks", *parts)).removesuffix(".__init__")
        if not name.endswith("__main__"):
            yield name, file


def test_import_brings_only_torch() -> None:
    assert newly_imported("stg_hooks") <= {"stg_hooks", "torch"}


# Derives from a class of its host, and is loaded when `stg.modular` is first used.
OF_ITS_HOST = {"stg_hooks.integrations.diffusers.skip_guidance"}


def test_no_module_of_ours_imports_its_host() -> None:
    modules = set(modules_of("stg_hooks", "adapters", "integrations"))
    assert modules >= OF_ITS_HOST
    assert newly_imported(*(modules - OF_ITS_HOST)) <= {"stg_hooks", "torch"}


def test_the_probe_sees_a_heavy_import(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("import json\nimport safetensors\nimport iniconfig\n")
    assert newly_imported("heavy", path=tmp_path) == {"heavy", "safetensors", "iniconfig"}


# --- arrows -----------------------------------------------------------------------------------------------------------


def imports(tree: ast.AST, *, nested: bool) -> Iterator[str]:
    """Yield the dotted names a module imports: when it loads, or anywhere in it if `nested`.

    Imports under `if TYPE_CHECKING:` never run and do not count.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not nested:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in node.orelse:
                yield from imports(ast.Module([other], []), nested=nested)
        else:
            yield from imports(node, nested=nested)


# The rooms of the core, from the ground up: none may import from one that comes later.
ROOMS = ("ground", "model", "hooks", "modes", "guidance", "passes", "ranks", "faces", "study")
GROUND = ("errors", "checks", "names", "step", "sampler_steps", "roles", "hosts")
FACES = (
    "session",
    "module_calls",
    "module_host",
    "rules",
    "skip",
    "parts",
    "answers",
    "denoiser",
    "uncond",
    "apply",
    "guider",
)


def room_of(module: str) -> int | None:
    room = module.split(".")[1] if module.startswith("stg_hooks.") else ""
    room = "faces" if room in FACES else "ground" if room in GROUND else room
    return ROOMS.index(room) if room in ROOMS else None


def upward(module: str, source: str) -> list[str]:
    own = room_of(module)
    if own is None:
        return []
    return [name for name in imports(ast.parse(source), nested=True) if (room_of(name) or 0) > own]


def test_rooms_use_what_lies_below_them() -> None:
    found = {name: upward(name, file.read_text(encoding="utf-8")) for name, file in sources("stg_hooks")}
    assert {name for name in found if room_of(name) is None} == {"stg_hooks"}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("stg_hooks.model.layers", "from stg_hooks.modes.switch import Switch", ["stg_hooks.modes.switch.Switch"]),
        ("stg_hooks.passes.rows", "def f():\n    from stg_hooks.skip import skip", ["stg_hooks.skip.skip"]),
        ("stg_hooks.guidance.trace", "from stg_hooks import step\nimport stg_hooks.model.layers", []),
        ("stg_hooks.study.sweep", "from stg_hooks.apply import apply", []),
    ],
)
def test_the_check_of_rooms_sees(module: str, source: str, wrong: list[str]) -> None:
    assert upward(module, source) == wrong


def test_no_circles_and_few_levels() -> None:
    known = dict(sources("stg_hooks"))
    uses: dict[str, set[str]] = {}
    for name, file in known.items():
        found = {f"{used}." for used in imports(ast.parse(file.read_text()), nested=False)}
        # A package is loaded before what is in it, whoever asks.
        others = {other for other in known if not f"{name}.".startswith(f"{other}.")}
        uses[name] = {other for other in others if any(used.startswith(f"{other}.") for used in found)}
    levels = 0
    while uses:
        free = {name for name, others in uses.items() if not others & uses.keys()}
        assert free, f"a circle among {sorted(uses)}"
        uses = {name: others for name, others in uses.items() if name not in free}
        levels += 1
    assert levels <= 12


# Which parts of the house each part may import; torch and the standard library are everybody's.
PARTS = ("adapters", "integrations", "demo", "cli")
MAY_USE = {"stg_hooks": set(), "adapters": {"adapters"}, "integrations": {"integrations"}}
# An adapter is data, so it has no business with a host even inside a function. An integration loads its host there.
ANYWHERE = {"adapters"}


def wrong_arrows(folder: str, source: str) -> list[str]:
    wrong = []
    for name in imports(ast.parse(source), nested=folder in ANYWHERE):
        first, second, *_ = [*name.split("."), ""]
        if first == "stg_hooks":
            if second in PARTS and second not in MAY_USE[folder]:
                wrong.append(name)
        elif first != "torch" and first not in sys.stdlib_module_names:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("folder", list(MAY_USE))
def test_arrows_point_one_way(folder: str) -> None:
    files = {name: file for name, file in sources(folder) if name not in OF_ITS_HOST}
    found = {name: wrong_arrows(folder, file.read_text(encoding="utf-8")) for name, file in files.items()}
    assert found, f"no modules in {folder}"
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("folder", "source", "wrong"),
    [
        ("stg_hooks", "import numpy as np", ["numpy"]),
        ("stg_hooks", "from stg_hooks import adapters", ["stg_hooks.adapters"]),
        ("stg_hooks", "import stg_hooks.integrations.diffusers", ["stg_hooks.integrations.diffusers"]),
        ("stg_hooks", "try:\n    from stg_hooks.demo import clips\nexcept ImportError: pass", ["stg_hooks.demo.clips"]),
        ("stg_hooks", "class A:\n    import diffusers", ["diffusers"]),
        ("stg_hooks", "if TYPE_CHECKING:\n    import a\nelse:\n    import b", ["b"]),
        ("stg_hooks", "import adapters", ["adapters"]),
        ("adapters", "from stg_hooks.integrations import diffusers", ["stg_hooks.integrations.diffusers"]),
        ("adapters", "def f():\n    import diffusers", ["diffusers"]),
        ("integrations", "from diffusers import DiffusionPipeline", ["diffusers.DiffusionPipeline"]),
        ("integrations", "from stg_hooks.adapters import wan", ["stg_hooks.adapters.wan"]),
        (
            "stg_hooks",
            "import os, torch.nn\nfrom stg_hooks.model.layers import layers\ndef f():\n    import diffusers",
            [],
        ),
        ("adapters", "from torch import nn\nfrom stg_hooks import skip\nfrom stg_hooks.adapters.table import T", []),
        ("integrations", "from __future__ import annotations\ndef f():\n    from diffusers import pipelines", []),
    ],
)
def test_the_arrow_check_sees(folder: str, source: str, wrong: list[str]) -> None:
    assert wrong_arrows(folder, source) == wrong


def test_k_diffusion_is_never_imported() -> None:
    """Its own import fails on many machines: what counts is how it calls and is called."""
    files = [file for folder in ("stg_hooks", "adapters", "integrations") for _, file in sources(folder)]
    found = [name for file in files for name in imports(ast.parse(file.read_text()), nested=True)]
    assert "torch" in found
    assert not [name for name in found if name.split(".")[0] == "k_diffusion"]
