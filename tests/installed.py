"""What the tests take from diffusers by name: where an older one is installed, a class may not be there yet."""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any

import diffusers
import pytest

DIFFUSERS = "0.42"
"""The version that the tables of the tests were written for. With this one and later ones, nothing is skipped."""
_IS_OLDER = [int(part) for part in diffusers.__version__.split(".")[:2]] < [int(part) for part in DIFFUSERS.split(".")]


def skip_if_older(why: str) -> None:
    """Skip the test if an older diffusers is installed."""
    if _IS_OLDER:
        pytest.skip(f"diffusers {diffusers.__version__}: {why}")


def from_diffusers(name: str) -> Any:
    """Return a class by its name, or by `module:name`; an older diffusers without it skips the test."""
    try:
        return pkgutil.resolve_name(f"diffusers.{name}" if ":" in name else f"diffusers:{name}")
    except (AttributeError, ImportError):
        skip_if_older(f"{name.rpartition(':')[2]} is not there")
        raise
    except RuntimeError as error:  # what diffusers raises where it needs another transformers
        skip_if_older(str(error).splitlines()[-1])
        raise


def made(name: str, **config: Any) -> Any:
    """Make an object of a class by its name; an older diffusers whose class takes less than that skips the test."""
    cls = from_diffusers(name)
    parameters = inspect.signature(cls.__init__).parameters
    unknown = set(config) - set(parameters)
    if unknown and all(one.kind is not inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        skip_if_older(f"{name} takes no {', '.join(sorted(unknown))}")
    return cls(**config)
