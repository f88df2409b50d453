"""Tell attention within frames from attention across them: by name, else by what a model does with frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stg_hooks.errors import BlockError
from stg_hooks.model.facts import stated
from stg_hooks.model.layers import attention_modules, is_attention
from stg_hooks.model.source import folds_into_batch
from stg_hooks.modes.token_probe import Looks, latents_among

Kind = Literal["spatial", "temporal"]

_NAMES = ("temporal", "temp_", "motion", "time_attn", "attn_t")


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """Tell spatial from temporal attention in a factorised model by its names, its classes, and adapters.

    Args:
        model: any module.

    Returns:
        Name of each attention module to its kind; empty where names do not tell, or the model is not factorised.
    """
    kinds = {name: _kind(model, name) for name in attention_modules(model)}
    return kinds if "temporal" in kinds.values() else {}


def may_be_factorised(model: nn.Module) -> bool:
    """Tell whether attention may see frames alone: whether the code of a model folds anything into the batch."""
    classes: set[Any] = {type(module) for module in model.modules() if not is_attention(module)}
    return any(folds_into_batch(cls) for cls in classes if not cls.__module__.startswith("torch."))


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


class FrameKinds:
    """The kinds of attention modules whose names do not tell."""

    def __init__(self, looks: Looks) -> None:
        """Prepare for one model.

        Args:
            looks: looks into the model.
        """
        self._looks = looks
        self._known: dict[int, Kind | None] = {}

    def chosen(self, targets: Sequence[tuple[str, nn.Module]], kind: Kind) -> list[tuple[str, nn.Module]]:
        """Choose the attention of one kind, in a call of the model.

        Args:
            targets: attention modules with their names.
            kind: which are wanted.

        Returns:
            Those of this kind.

        Raises:
            BlockError: there is none.
        """
        found = {name: self._kind(module) for name, module in targets}
        if kind not in found.values():
            model = type(self._looks.model).__name__
            seen = ", ".join(f"{name!r} {_WHAT[what]}" for name, what in found.items())
            raise BlockError(
                f"kind={kind!r}: {model} has no such attention in this layer: {seen}. "
                + temporal_lines(self._looks.model, list(found))
            )
        return [(name, module) for name, module in targets if found[name] == kind]

    def _kind(self, module: nn.Module) -> Kind | None:
        if id(module) not in self._known:
            try:
                self._known[id(module)] = self._look(module)
            except Exception:  # in a call that nobody has asked for: what follows says that it is not known
                self._known[id(module)] = None
        return self._known[id(module)]

    def _look(self, module: nn.Module) -> Kind | None:
        latents = latents_among(self._looks.tensors())[0]
        if latents.ndim != 5:
            return None
        height, width = latents.shape[-2:]

        def change(leaf: Tensor) -> Tensor:
            if leaf is not latents:
                return leaf
            corner = torch.zeros_like(leaf)
            corner[..., : (height + 1) // 2, : (width + 1) // 2] = 1.0
            return leaf + corner

        one, other = self._looks.given(module, change)
        name = next(iter(one))
        if one[name].ndim != 3 or len(one[name]) == len(latents):
            return None
        # Pixels in a corner were changed, in all frames: so are either some of the rows, or some tokens of every row.
        difference = (one[name] - other[name]).float().square().sum(-1)
        among_rows, among_tokens = (float(difference.mean(dim).std()) for dim in (1, 0))
        return "temporal" if among_rows > among_tokens else "spatial"


_WHAT: dict[Kind | None, str] = {
    "spatial": "works within frames",
    "temporal": "works across frames",
    None: "does not see frames alone",
}


def _kind(model: nn.Module, name: str) -> Kind:
    words = [word for of_class in stated("TEMPORAL", model) for word in of_class]
    parts = name.split(".")
    inner = [".".join(parts[: i + 1]) for i in range(len(parts))]
    classes = [type(module).__name__ for module in (model, *map(model.get_submodule, inner))]
    named = any(word in part for part in parts for word in _NAMES) or any(word in name for word in words)
    built = any("Temporal" in cls and "Spatio" not in cls for cls in classes)
    return "temporal" if named or built else "spatial"
