"""Have the attention of skipped layers computed where a mode can see it, whatever backend a user runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_OVERRIDE = "optimized_attention_override"  # ComfyUI's name


class _OfThread(threading.local):
    is_plain = False


_LOCAL = _OfThread()


@contextmanager
def plain_attention(attention: nn.Module) -> Iterator[None]:
    """Have attention computed with torch's own within a `with`, in calls with `visible_attention`."""
    before, _LOCAL.is_plain = _LOCAL.is_plain, True
    try:
        yield
    finally:
        _LOCAL.is_plain = before


def visible_attention(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a model call in which `plain_attention` has an effect; other layers keep their backend."""
    before = options.get(_OVERRIDE)

    def attention(function: Any, *args: Any, **kwargs: Any) -> Any:
        if _LOCAL.is_plain:
            from comfy.ldm.modules.attention import attention_pytorch

            return attention_pytorch(*args, **kwargs)
        return function(*args, **kwargs) if before is None else before(function, *args, **kwargs)

    return {**options, _OVERRIDE: attention}
