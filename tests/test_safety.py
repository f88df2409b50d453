"""Safe by construction: no code from data, no network at import, and no name or glob that explodes."""

from __future__ import annotations

import ast
import os
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import stg_hooks as stg
from stg_hooks.model.resolve import _glob_matches
from tests import zoo
from tests.zoo import resolve

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("stg_hooks", "adapters", "integrations")
SOURCES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]

# --- no code from data ------------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "ctypes"}
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "aiohttp", "huggingface_hub"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "os.popen", "torch.hub.load"}


def unsafe(source: str) -> Iterator[str]:
    """List what a source file imports or calls of that which runs code from data, or talks to a network."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
            yield ast.unparse(node.func)
        yield from (name for name in names if name.partition(".")[0] in MODULES | NETWORK or name in CALLS)


def test_no_code_from_data_and_no_network() -> None:
    found = {str(file.relative_to(ROOT)): list(unsafe(file.read_text(encoding="utf-8"))) for file in SOURCES}
    assert len(found) > 100
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import urllib.request",
        "def f():\n    import requests",
        "x = eval('1')",
        "torch.load('weights.pt')",
        "from torch import load",
        "os.system('ls')",
        "class A:\n    def f(self): return exec(self.code)",
    ],
)
def test_the_search_sees(source: str) -> None:
    assert list(unsafe(source))


def test_weights_are_safetensors_only() -> None:
    """No file that we ship has a format that can hold code, but for what is code: Python's, and a browser's.

    A node pack of ComfyUI says in text files what it is and needs.
    """
    shipped = {file.suffix for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file()}
    assert shipped - {".pyc"} <= {".py", ".typed", ".safetensors", ".json", ".html", ".css", ".js", ".toml", ".txt"}


# --- no network at import ---------------------------------------------------------------------------------------------

PROBE = """
import importlib, sys
def watch(event, args):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto", "urllib.")):
        print(event)
    if event in ("pickle.find_class", "subprocess.Popen", "os.system"):
        print(event)
sys.addaudithook(watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def events(*modules: str, path: Path = ROOT, before: str = "import torch") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", before + PROBE, *modules],
        env=os.environ | {"PYTHONPATH": str(path)},
        cwd=path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_opens_no_connection() -> None:
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((ROOT / "stg_hooks").rglob("*.py"))
        if file.stem != "__main__"
    ]
    for file in SOURCES:
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] in FOLDERS[1:]:
            names.append(".".join(("stg_hooks", *parts)).removesuffix(".__init__"))
    assert "stg_hooks.integrations.diffusers.host" in names
    assert events(*(name.removesuffix(".__init__") for name in names)) == []


def test_the_probe_sees_a_connection(tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text(
        "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 0.1)\nexcept OSError:\n    pass\n"
    )
    assert "socket.connect" in events("chatty", path=tmp_path, before="")


# --- what users type as layers ----------------------------------------------------------------------------------------

MODEL = zoo.build("wrapped")
NAMES = [name for name, _ in MODEL.named_modules() if name]
PARTS = ["blocks", "*", "?", "[", "]", "[!a-z]", "[]", "[z-a]", "0", "1", "-1", "--1", "attn", ".", "..", "**", "", "²"]
text = st.one_of(
    st.text(max_size=30),
    st.text(alphabet=string.ascii_lowercase[:4] + ".*?[]!-^$\\+(){}|0123456789", max_size=60),
    st.lists(st.sampled_from(PARTS), max_size=12).map(".".join),
    st.lists(st.sampled_from(PARTS), max_size=12).map("".join),
    st.sampled_from(NAMES),
)
plain = st.one_of(
    text,
    st.integers(),
    st.integers(-6, 6),
    st.booleans(),
    st.none(),
    st.floats(),
    st.binary(max_size=4),
    st.complex_numbers(),
    st.builds(range, st.integers(-5, 5), st.integers(), st.sampled_from([-3, -1, 1, 7])),
    st.sampled_from([MODEL, *MODEL.modules(), nn.ModuleList(), nn.Sequential(), nn.Identity(), int, len, object()]),
)
specs = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.integers(), inner, max_size=2),
        st.lists(inner, max_size=3).map(iter),
    ),
    max_leaves=8,
)


@example(range(10**15))
@example([range(-(10**15), 0)])
@example("--5")
@example("9" * 5000)
@example("-" * 40 + "1")
@example(10**400)
@example("*" * 5000)
@example("*a" * 2000 + "b")
@example("[" * 2000)
@example("[a-z" * 500)
@example(".".join("*" * 3000))
@example("a" * 20_000)
@example("\ud800")
@example("blocks.0\n")
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(specs)
@pytest.mark.timeout(60)
def test_layers_are_resolved_or_refused(spec: Any) -> None:
    """Whatever is given as layers: real layers of the model, or an error of ours that fits on a screen."""
    message = ""
    found: list[Any] = []
    try:
        found = resolve(MODEL, spec)
    except (stg.LayerError, stg.TargetError) as error:
        message = str(error)
    assert bool(found) != bool(message)
    assert len(message) < 2000
    for layer in found:
        assert MODEL.get_submodule(layer.name) is layer.module


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.sampled_from(["a", "b", "*", "?", "[ab]", "."]), max_size=12).map("".join))
def test_a_glob_means_what_it_says(pattern: str) -> None:
    """Against matching by hand, one character after the other."""

    def matches(wanted: list[str], name: str) -> bool:
        if not wanted:
            return not name
        first, rest = wanted[0], wanted[1:]
        if first == "*":
            return any(matches(rest, name[i:]) for i in range(len(name) + 1))
        return bool(name) and (first == "?" or name[0] in first.strip("[]")) and matches(rest, name[1:])

    def tokens(part: str) -> list[str]:
        found = []
        while part:
            size = 4 if part.startswith("[ab]") else 1
            found.append(part[:size])
            part = part[size:]
        return found

    wanted = pattern.split(".")
    for name in ("a", "ab", "ba", "a.b", "ab.ba", "abba.a.b"):
        parts = name.split(".")
        expected = len(wanted) <= len(parts) and all(
            matches(tokens(want), part) for want, part in zip(wanted, parts[len(parts) - len(wanted) :], strict=True)
        )
        assert _glob_matches(pattern, name) == expected


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    for spec in (endless, deep):
        with pytest.raises(stg.TargetError, match="nested"):
            resolve(MODEL, spec)
        with pytest.raises(stg.TargetError, match="nested"):
            stg.apply(MODEL, spec)


@pytest.mark.timeout(60)
def test_layers_of_a_schedule_are_refused_as_well() -> None:
    guider = stg.Guider(MODEL, [1], schedule=lambda step: {"layers": range(10**15)})
    with pytest.raises(stg.LayerError, match="has 4 layers"):
        guider(**zoo.inputs())
