"""Which pipeline is running in this thread."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

# Code that has been seen on the stack, by `id`, and which of its arguments is a running pipeline: empty if none is.
_OWNERS: dict[int, tuple[CodeType, str]] = {}


def is_modular(target: object) -> bool:
    """Tell whether an object is a modular pipeline."""
    return any(cls.__name__ == "ModularPipeline" for cls in type(target).__mro__)


def calling_pipeline() -> object | None:
    """Find the innermost pipeline that is running in this thread."""
    from diffusers import DiffusionPipeline

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        known = _OWNERS.get(id(code))
        if known is None:
            names = code.co_varnames[: code.co_argcount][:2]
            owner = next((name for name in ("components", "self") if name in names), "")
            # Looking at the locals of a frame keeps them alive until it ends: not where no pipeline can be.
            may_be = owner and (code.co_name == "__call__" or module_of(frame).startswith("diffusers."))
            found = frame.f_locals.get(owner) if may_be else None
            known = code, owner if isinstance(found, DiffusionPipeline) or is_modular(found) else ""
            _OWNERS[id(code)] = known
        if known[1]:
            pipeline: object = frame.f_locals[known[1]]
            return pipeline
        frame = frame.f_back
    return None


def module_of(frame: FrameType) -> str:
    """Return the name of the module whose code runs in a frame."""
    return str(frame.f_globals.get("__name__"))
