"""What a mode is: it takes a call of a skipped layer, and says what it needs of the layer."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import nn

from stg_hooks.names import spelt

if TYPE_CHECKING:
    from stg_hooks.modes.attention import AttentionSeam
    from stg_hooks.modes.feed_forward import FeedForwards
    from stg_hooks.modes.isolation import Isolation
    from stg_hooks.modes.residual import Streams
    from stg_hooks.modes.self_attention import Change


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a skipped layer, as a mode sees it."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: Streams
    forward: Callable[..., Any]
    seam: AttentionSeam
    feed_forwards: FeedForwards
    isolation: Isolation
    memory: dict[str, Any]
    """What a mode keeps from one call of the layer to the next."""
    name: str = ""
    """The layer's dotted name in the model."""

    def compute(self, attention: Change | None = None) -> Any:
        """Run the layer and return its real output.

        Args:
            attention: what a computation of self-attention inside gives instead, from an
                `attention_calls.AttentionCall`.
        """
        if attention is None:
            return self.forward(*self.args, **self.kwargs)
        return self.seam.run(attention, self.forward, self.args, self.kwargs)


Mode = Callable[[LayerCall], Any]
"""What a user may pass as a mode, besides a name: takes the call and returns what the layer should return."""


Needs = Literal["block", "attention", "feed-forward", "streams", "layer", "anything"]
"""What a layer must be or hold: a whole block, self-attention, a block with a feed-forward network or with several
streams; or any layer will do, whose attention is not looked into (`"layer"`) or may be (`"anything"`).
"""


class Perturbation(abc.ABC):
    """A mode that says what it needs."""

    name: ClassVar[str]
    needs: ClassVar[Needs]
    sees_text: ClassVar[bool] = False
    """Whether it has to know which tokens of a joint attention are text."""
    is_bypass: ClassVar[bool] = False
    """Whether the layer is not computed at all."""
    mixes_tokens: ClassVar[bool] = False
    """Whether tokens move to other places, so that it needs all of them on one device."""
    is_of_model: ClassVar[bool] = False
    """Whether it is meant for all layers of a model, where none are named."""
    verb: ClassVar[str] = "is for"
    """What it does with a layer, for errors: `mode='residual' bypasses whole blocks`."""

    @abc.abstractmethod
    def __call__(self, call: LayerCall) -> Any:
        """Return what the layer gives instead."""

    @property
    def spelling(self) -> str:
        """The mode as it is typed: its name, and the values that are not the usual ones."""
        fields = dataclasses.fields(cast(Any, self))
        return spelt(self.name, {f.name: v for f in fields if (v := getattr(self, f.name)) != f.default})

    def __str__(self) -> str:
        """Write the mode as it is typed, for errors."""
        return f"mode={self.spelling!r}"
