"""Make the nodes known to a ComfyUI: `python -m stg_hooks.integrations.comfyui`, in its folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_SOURCE = '"""Nodes of stg_hooks."""\nfrom stg_hooks.integrations.comfyui import *\n'


def install(comfyui: Path) -> Path:
    """Write an entry of `custom_nodes`, with the example workflows.

    Args:
        comfyui: ComfyUI's folder.

    Returns:
        The entry.

    Raises:
        FileNotFoundError: it is not ComfyUI's folder.
    """
    if not (comfyui / "custom_nodes").is_dir():
        raise FileNotFoundError(f"{comfyui.resolve()} has no folder custom_nodes: name the folder of ComfyUI.")
    entry = comfyui / "custom_nodes" / "stg_hooks_nodes"
    entry.mkdir(exist_ok=True)
    (entry / "__init__.py").write_text(_SOURCE, encoding="utf-8")
    shutil.copytree(_HERE / "example_workflows", entry / "example_workflows", dirs_exist_ok=True)
    return entry


def main(args: list[str]) -> int:
    """Install into the folder that is named, or else the current one; return the exit status."""
    try:
        entry = install(Path(args[0] if args else "."))
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{entry.resolve()} was written. Restart ComfyUI.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
