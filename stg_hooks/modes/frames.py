"""Tell attention within frames from attention across them, by names, classes and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from stg_hooks.checks import check_choice
from stg_hooks.model.attention import attention_modules
from stg_hooks.model.facts import stated

Kind = Literal["spatial", "temporal"]

_NAMES = ("temporal", "temp_", "motion", "time_attn", "attn_t")


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """Tell spatial from temporal attention in a factorised model by its names, its classes, and adapters.

    Args:
        model: any module.

    Returns:
        Name of each attention module to its kind; empty where none of them is known to work across frames.
    """
    kinds = {name: _kind(model, name) for name in attention_modules(model)}
    return kinds if "temporal" in kinds.values() else {}


def temporal_lines(model: nn.Module, names: Sequence[str]) -> str:
    """Write, as the end of an error, how to state which attention works across frames.

    Args:
        model: the model.
        names: attention modules of it, one of which may be meant.
    """
    part = f".{names[0].rpartition('.')[2]}" if names else "..."
    return (
        "Leave kind out, or, if attention here works across frames alone, first state a part of its name:\n"
        "  from stg_hooks.adapters import TEMPORAL\n"
        f'  TEMPORAL["{type(model).__name__}"] = ("{part}",)'
    )


def _kind(model: nn.Module, name: str) -> Kind:
    words = [word for of_class in stated("TEMPORAL", model) for word in of_class]
    parts = name.split(".")
    inner = [".".join(parts[: i + 1]) for i in range(len(parts))]
    classes = [type(module).__name__ for module in (model, *map(model.get_submodule, inner))]
    named = any(word in part for part in parts for word in _NAMES) or any(word in name for word in words)
    built = any("Temporal" in cls and "Spatio" not in cls for cls in classes)
    return "temporal" if named or built else "spatial"


def check_kind(kind: object) -> None:
    """Raise `SettingError` for an unknown kind of attention."""
    if kind is not None:
        check_choice(f"kind={kind!r}", kind, get_args(Kind))
