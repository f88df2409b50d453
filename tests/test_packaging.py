"""The wheel holds the whole package, under one top-level name, and can be imported from where it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import stg_hooks

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "stg_hooks": ROOT / "stg_hooks",
    "stg_hooks/adapters": ROOT / "adapters",
    "stg_hooks/integrations": ROOT / "integrations",
}

# One worker builds the wheel once.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_sources(to: Path) -> Path:
    """Copy what the build reads, so that it leaves nothing in the checkout."""
    to.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for name in ("stg_hooks", "adapters", "integrations", "tests"):
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return to


def shipped_files() -> set[str]:
    """List what must be in the wheel, from the folders themselves."""
    expected = {"stg_hooks/py.typed"}
    for package, folder in SOURCES.items():
        # Links are not followed: adapters and integrations have entries of their own.
        for directory, below, files in os.walk(folder, followlinks=False):
            below[:] = [name for name in below if name != "__pycache__"]
            relative = Path(package) / Path(directory).relative_to(folder)
            expected |= {(relative / name).as_posix() for name in files if name.endswith(".py")}
    for weights in (ROOT / "stg_hooks/demo/weights").glob("*"):
        if weights.suffix in {".safetensors", ".json"}:
            expected.add(weights.relative_to(ROOT).as_posix())
    workflows = ROOT.glob("integrations/comfyui/example_workflows/*.json")
    expected |= {f"stg_hooks/{file.relative_to(ROOT).as_posix()}" for file in workflows}
    expected |= {part.relative_to(ROOT).as_posix() for part in ROOT.glob("stg_hooks/study/report/page/*")}
    return expected


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, or take the one that `make build` made."""
    if made := os.environ.get("STG_HOOKS_WHEEL"):
        return Path(made)
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_sources(folder / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "dist", cwd=source)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def content(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_one_top_level_name(content: set[str]) -> None:
    top = {name.split("/")[0] for name in content}
    assert {name for name in top if not name.endswith(".dist-info")} == {"stg_hooks"}
    assert len(top) == 2


def test_wheel_holds_every_source_file_and_nothing_else(content: set[str]) -> None:
    inside = {name for name in content if ".dist-info/" not in name}
    expected = shipped_files()
    assert sorted(expected - inside) == [], "missing: is the subpackage listed in pyproject.toml?"
    assert sorted(inside - expected) == [], "left-overs"
    for must in ("stg_hooks/__init__.py", "stg_hooks/adapters/__init__.py", "stg_hooks/integrations/__init__.py"):
        assert must in inside
    assert any(name.startswith("stg_hooks/demo/weights/") for name in inside), "the demo's weights are missing"


def test_metadata(wheel: Path, content: set[str]) -> None:
    (name,) = (n for n in content if n.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch>=2.5"]
    wanted = [line.removeprefix("Requires-Dist: ") for line in required]
    for needed in ("imageio", "imageio-ffmpeg", "sentencepiece", "protobuf"):  # by the first snippet of README
        assert any(re.match(rf"{needed}\b(?!-).*extra == .diffusers", line) for line in wanted), needed
    assert "License-Expression: Apache-2.0" in metadata.splitlines()
    assert f"Version: {stg_hooks.__version__}" in metadata.splitlines()
    assert any(n.endswith("/licenses/LICENSE") for n in content)


def test_links_are_relative() -> None:
    for name in ("adapters", "integrations"):
        link = ROOT / "stg_hooks" / name
        if not link.is_symlink():
            pytest.skip("this checkout has no symbolic links")
        assert link.readlink() == Path("..") / name


def test_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    files = [name for name in shipped_files() if name.endswith(".py") and not name.startswith("stg_hooks/demo/")]
    modules = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files)
    code = f"import importlib\nfor name in {modules!r}:\n    print(importlib.import_module(name).__file__)"
    said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    loaded = [line for line in said if line.endswith(".py")]  # diffusers, which one of them imports, may warn
    assert len(loaded) == len(modules)
    assert [file for file in loaded if not Path(file).is_relative_to(target)] == [], (
        "imported from the checkout instead"
    )


def test_a_torch_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (dependency,) = re.findall(r'^dependencies = \["torch>=([0-9.]+)"\]', (ROOT / "pyproject.toml").read_text(), re.M)
    monkeypatch.setattr("torch.__version__", "2.4.1+cpu")
    with pytest.raises(ImportError, match=rf"needs torch >= {dependency}; this is 2\.4\.1\+cpu: pip install"):
        stg_hooks.__getattr__("apply")
    assert stg_hooks.__getattr__("StgError") is stg_hooks.StgError


def test_the_oldest_versions_that_are_tested_are_those_that_are_claimed() -> None:
    pins = dict(re.findall(r"^([a-z-]+)==([0-9.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    claimed = dict(re.findall(r'"([a-z]+)>=([0-9.]+)[,"]', (ROOT / "pyproject.toml").read_text()))
    for name in ("torch", "numpy", "diffusers", "transformers", "accelerate", "safetensors"):
        assert f"{pins[name]}.".startswith(f"{claimed[name]}."), name
