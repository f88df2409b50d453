"""The modes: what a skipped layer gives back instead of its own output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from stg_hooks.errors import LayerError, SettingError, closest
from stg_hooks.layers import Layer, is_attention
from stg_hooks.streams import Streams


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a skipped layer, as a mode sees it."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: Streams
    forward: Callable[..., Any]

    def compute(self) -> Any:
        """Run the layer as it is and return its real output."""
        return self.forward(*self.args, **self.kwargs)


Mode = Callable[[LayerCall], Any]


def residual(call: LayerCall) -> Any:
    """Bypass a block: every stream leaves it as it entered, `z_{l+1} = z_l` (STG-R).

    Args:
        call: the call of the block; it is not computed, except once where its source does not tell what it returns.

    Returns:
        The block's inputs, in the structure of its output.

    Source: STG, arXiv 2411.18664, Eq. 15.
    """
    known, output = call.streams.bypass(call.args, call.kwargs)
    if not known:
        call.streams.learn(call.args, call.kwargs, call.compute())
        _, output = call.streams.bypass(call.args, call.kwargs)
    return output


MODES: dict[str, Mode] = {"residual": residual}


def find_mode(mode: str | Mode) -> Mode:
    """Look up a mode by name; a callable is a mode already.

    Args:
        mode: a name among `MODES`, or a callable that takes a `LayerCall` and returns what the layer should return.

    Returns:
        The callable.

    Raises:
        SettingError: a name that is no mode, or something that is neither.
    """
    if isinstance(mode, str):
        if mode in MODES:
            return MODES[mode]
        names = ", ".join(map(repr, MODES))
        raise SettingError(f"mode={mode!r} does not exist. There is {names}, or pass a callable.{closest(mode, MODES)}")
    if not callable(mode):
        raise SettingError(f"mode={mode!r}: expected a name or a callable, not {type(mode).__name__}.")
    return mode


def check_mode(mode: Mode, layers: list[Layer]) -> None:
    """Raise if one of the layers cannot be skipped in this mode.

    Args:
        mode: what `find_mode` returned.
        layers: the resolved layers.

    Raises:
        LayerError: a bypass of an attention module inside a block, which would put the *input* of the attention,
            normalised and unprojected, onto the block's own stream.
    """
    for layer in layers:
        if mode is residual and layer.index is None and is_attention(layer.module):
            block = layer.name.rpartition(".")[0]
            raise LayerError(
                f"layers=[{layer.name!r}]: mode='residual' bypasses whole blocks, and this is an attention module "
                f"inside one. Did you mean layers=[{block!r}]?"
            )
