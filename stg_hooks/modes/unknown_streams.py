"""What an error says of a block whose inputs cannot be told to stand in for its outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from stg_hooks.model import objects
from stg_hooks.model.source import bound_arguments, signature_text

_MATCHES = ("none of its inputs matches", "one input matches, but does not resemble,", "several inputs match")


class Observed(NamedTuple):
    """One call of a block: what it was given, and what it returned."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def complaint(self, value: object, matches: int) -> str:
        """Say what the block returned that no input stands in for, and what to type.

        Args:
            value: what it returned: a tensor, or something that holds none.
            matches: how many inputs have its shape and dtype.
        """
        kind = type(self.block).__name__
        given = bound_arguments(self.block, self.args, self.kwargs)
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in objects.leaves(given) if isinstance(leaf, Tensor))
        culprit = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        found = f"{culprit} that {_MATCHES[min(matches, 2)]} in shape and dtype (inputs: {shapes or 'none'})"
        return (
            f"{kind} returns {found}, so which inputs pass through it is not known, and it cannot be bypassed.\n"
            f"  it is:    {kind}.forward{signature_text(self.block)}\n"
            f"  it got:   {', '.join(f'{name}={described(value)}' for name, value in given.items())}\n"
            f"  it gave:  {described(self.output)}\n"
            f"Skip another layer, or {self._advice(given)}"
        )

    def _advice(self, given: dict[str, Any]) -> str:
        names = [name for name, value in given.items() if any(isinstance(t, Tensor) for t in objects.leaves(value))]
        leaves = [leaf for leaf in objects.leaves(self.output) if leaf is not None]
        if all(isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves):
            stand_ins = tuple(names[: sum(isinstance(leaf, Tensor) for leaf in leaves)])
            return (
                "first state which arguments stand in for the tensors that it gave, in their order:\n"
                "  from stg_hooks.adapters import STREAMS\n"
                f'  STREAMS["{type(self.block).__name__}"] = {stand_ins}'.replace("'", '"')
            )
        return (
            "say what passes through, in the form that it gave:\n"
            f"{_imported(self.output)}"
            f"  def pass_through(call): return {self._suggestion()}\n"
            "  stg.skip(model, layers, mode=pass_through)   # stg.apply and stg.Guider take mode= as well"
        )

    def _suggestion(self) -> str:
        """Write the expression that most likely is what the user has to type."""
        names = [f"call.args[{i}]" for i, value in enumerate(self.args) if isinstance(value, Tensor)]
        names += [f'call.kwargs["{name}"]' for name, value in self.kwargs.items() if isinstance(value, Tensor)]
        stream = names[0] if names else "..."
        if isinstance(self.output, Tensor):
            return stream
        if isinstance(self.output, (list, tuple)):
            streams = iter(names)
            parts = [next(streams, "...") if isinstance(value, Tensor) else described(value) for value in self.output]
            return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
        return f"{type(self.output).__name__}({stream})"


def reshaped(given: Tensor, made: Tensor) -> str:
    """Say that a stream leaves in another shape than it came."""
    return (
        f"\n{tuple(given.shape)} becomes {tuple(made.shape)}: the block changes the shape of its stream, as where the "
        "resolution or the number of channels changes, so its input cannot take the place of its output. A mode of "
        "attention (mode='values') leaves the shape alone."
    )


def described(value: Any) -> str:
    """Write a value with the shapes of its tensors, not their numbers."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(described, value))})"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def _imported(output: Any) -> str:
    kind = type(output)
    return "" if kind.__module__ == "builtins" else f"  from {kind.__module__} import {kind.__name__}\n"
