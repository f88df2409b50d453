"""Match what a block returns to what it was given, so that a bypassed block can hand its inputs through."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.errors import BlockError
from stg_hooks.inspection import bound_arguments, class_forward, return_names


class Streams:
    """What one block returns, in terms of its own arguments.

    The names in the block's `return` statement settle it for most blocks, without running anything. Where they do not
    (an expression, an output object, several forms), one real output is matched by shape and dtype and remembered.
    """

    def __init__(self, block: nn.Module) -> None:
        """Prepare for one block.

        Args:
            block: the module that is going to be bypassed.
        """
        self._block = block
        self._names = return_names(class_forward(block))
        self._learned: tuple[list[int | None], list[Any], pytree.TreeSpec] | None = None

    def bypass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Build what the block would return if every stream left it as it entered.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.

        Returns:
            Whether it is known already, and the output: if not, run the block once and pass it to `learn`.
        """
        given = bound_arguments(self._block, args, kwargs)
        if self._names is not None:
            wanted = (self._names,) if isinstance(self._names, str) else self._names
            if all(name is None or name in given for name in wanted):
                values = tuple(None if name is None else given[name] for name in wanted)
                if any(isinstance(value, Tensor) for value in values):
                    return True, values[0] if isinstance(self._names, str) else values
        if self._learned is None:
            return False, None
        sources, constants, spec = self._learned
        tensors = _tensors(given)
        leaves = [
            constant if source is None else tensors[source] for source, constant in zip(sources, constants, strict=True)
        ]
        return True, pytree.tree_unflatten(leaves, spec)

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remember which argument each tensor of a real output corresponds to, by shape and dtype.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            output: what the block returned.

        Raises:
            BlockError: a tensor in the output that no argument can stand in for.
        """
        tensors = _tensors(bound_arguments(self._block, args, kwargs))
        leaves, spec = pytree.tree_flatten(output)
        free = set(range(len(tensors)))
        sources: list[int | None] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
                    raise BlockError(self._explain(tensors, output, f"a {type(leaf).__name__}"))
                sources.append(None)
                continue
            fits = [i for i in sorted(free) if tensors[i].shape == leaf.shape and tensors[i].dtype == leaf.dtype]
            if not fits:
                raise BlockError(self._explain(tensors, output, f"a tensor {tuple(leaf.shape)}"))
            free.discard(fits[0])
            sources.append(fits[0])
        constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._learned = sources, constants, spec

    def _explain(self, tensors: list[Tensor], output: Any, culprit: str) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        return (
            f"{type(self._block).__name__} returns {culprit} that none of its inputs matches in shape and dtype "
            f"(inputs: {shapes or 'none'}), so it cannot be bypassed: it does not hand a stream through. Skip another "
            "layer, or pass a callable as mode that builds the output."
        )


def _tensors(given: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
