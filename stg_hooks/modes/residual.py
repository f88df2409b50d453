"""Match what a block returns to what it was given, so that the inputs of a bypassed block pass through."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.errors import BlockError
from stg_hooks.model import objects
from stg_hooks.model.attention import attention_modules, is_attention, is_bare_attention
from stg_hooks.model.facts import stated
from stg_hooks.model.objects import copied
from stg_hooks.model.source import (
    bound_arguments,
    class_forward,
    names_in_return,
    return_names,
    signature_of,
    words_of,
)
from stg_hooks.modes.feed_forward import feed_forwards
from stg_hooks.modes.unknown_streams import Observed, described, reshaped

# A block adds to its stream, so its output resembles what it was given: by the cosine between them, over all elements.
_MARGIN = 0.1  # by which the input chosen must resemble it more than any other of the same shape
_NOISE = 0.05  # what unrelated tensors reach by chance; less where there are more elements


@dataclasses.dataclass(frozen=True)
class _Correspondence:
    """What one real output was made of."""

    given: tuple[pytree.TreeSpec, tuple[bool, ...]]
    """The structure of the arguments, and the flags among them, for which this holds."""
    sources: list[int | None]
    """For each leaf of the output the number of the argument's leaf that stands in for it, `None` for a constant."""
    constants: list[Any]
    spec: pytree.TreeSpec


class Streams:
    """What one block returns, in terms of its own arguments.

    The names in the block's `return` statement settle it for most blocks, without running anything. Where they do not
    (an expression, an output object, several forms), one real output is matched by shape and dtype and remembered.
    An adapter, `STREAMS`, comes before both.
    """

    def __init__(self, block: nn.Module) -> None:
        """Prepare for one block.

        Args:
            block: the module that is going to be bypassed.
        """
        self._block = block
        self._signature = signature_of(block)
        self._stated: tuple[str, ...] | None = next(iter(stated("STREAMS", block)), None)
        self._names = return_names(class_forward(block)) if self._stated is None else None
        self._learned: list[_Correspondence] = []
        self._may_reshape = any(
            name == "weight" and weight.ndim > 2
            for m in block.modules()
            for name, weight in m._parameters.items()
            if weight is not None
        )
        """Whether it has convolutions, so that what it calls by one name may leave in another shape than it came."""
        self.may_be_sublayer = is_bare_attention(block) or (
            not is_attention(block) and bool(attention_modules(block) and not feed_forwards(block))
        )
        """Whether its output may not contain its input: attention, and what holds it without a feed-forward network."""

    def passed_through(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Build what the block would return if every stream left it as it entered.

        Args:
            forward: computes the block: called once, on copies of the arguments, where its source does not tell.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.

        Returns:
            The arguments that stand in for the block's output, in its structure.

        Raises:
            BlockError: as `learn`.
        """
        known, output = self.bypass(args, kwargs)
        if known and self._may_reshape and not torch.compiler.is_compiling():
            own_args, own_kwargs = copied(args, kwargs)
            self._check_shapes(args, kwargs, output, forward(*own_args, **own_kwargs))
            self._may_reshape = False
        if not known:
            own_args, own_kwargs = copied(args, kwargs)
            self.learn(args, kwargs, forward(*own_args, **own_kwargs), objects.leaves((own_args, own_kwargs)))
            _, output = self.bypass(args, kwargs)
        return output

    def bypass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """Build what the block would return if every stream left it as it entered.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.

        Returns:
            Whether it is known already, and the output: if not, run the block once and pass it to `learn`.
        """
        given = bound_arguments(self._block, args, kwargs, self._signature)
        if self._names is not None:
            wanted = (self._names,) if isinstance(self._names, str) else self._names
            if all(name is None or name in given for name in wanted):
                values = tuple(None if name is None else given[name] for name in wanted)
                if any(isinstance(leaf, Tensor) for leaf in objects.leaves(values)):
                    return True, values[0] if isinstance(self._names, str) else values
        leaves, structure = _structure(given)
        for known in self._learned:
            if known.given == structure:
                pairs = zip(known.sources, known.constants, strict=True)
                output = [constant if source is None else leaves[source] for source, constant in pairs]
                return True, pytree.tree_unflatten(output, known.spec)
        return False, None

    def learn(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, own: Sequence[Any] = ()) -> None:
        """Remember which argument each tensor of a real output corresponds to.

        An argument that was handed on is itself. What comes in an object, as a dataclass, corresponds to the same
        attribute of the object that came in. Else shape and dtype tell.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            output: what the block returned.
            own: the leaves of the arguments that it was given, where they are copies.

        Raises:
            BlockError: a tensor in the output that no argument can stand in for, or several as well as each other; or
                an adapter that does not fit.
        """
        given = bound_arguments(self._block, args, kwargs, self._signature)
        inputs, structure = _structure(given)
        leaves, spec = objects.flatten(output)
        originals = dict(zip(map(id, own), objects.leaves((args, kwargs)), strict=True)) if own else {}
        handed_on = [originals.get(id(leaf), leaf) for leaf in leaves]
        numbers = {id(leaf): i for i, leaf in enumerate(inputs) if not isinstance(leaf, _PLAIN)}
        constants = [leaf if isinstance(leaf, _PLAIN) else None for leaf in leaves]
        owners = [name for name, value in given.items() for _ in objects.leaves(value)]
        free = [i for i, leaf in enumerate(inputs) if isinstance(leaf, Tensor)]
        stated = None if self._stated is None else self._stand_ins(self._stated, [(i, owners[i]) for i in free], output)
        sources = [None if isinstance(leaf, _PLAIN) else numbers.get(id(leaf)) for leaf in handed_on]
        sources = _by_attribute(output, sources, given, inputs)
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, _PLAIN):
                continue
            if stated is not None and isinstance(leaf, Tensor):
                sources[position] = stated.pop(0)
                continue
            fits: list[int] = []
            if sources[position] is None and isinstance(leaf, Tensor):
                fits = self._narrowed([i for i in free if _same_form(inputs[i], leaf)], owners, leaves, position)
                sources[position] = _choose(leaf, fits, inputs, free[0]) if fits else None
            if sources[position] is None:
                raise BlockError(Observed(self._block, args, kwargs, output).complaint(leaf, len(fits)))
            free = [i for i in free if i != sources[position]]
        self._learned.append(_Correspondence(structure, sources, constants, spec))

    def _narrowed(self, fits: list[int], owners: list[str], leaves: list[Any], position: int) -> list[int]:
        """Keep of the inputs that fit an output those that are likely to be it, if there are any.

        They are named at its place in `return`; a single stream is none of what comes beside it.
        """
        named = names_in_return(class_forward(self._block), position, len(leaves))
        fits = [i for i in fits if owners[i] in named] or fits
        if sum(isinstance(leaf, Tensor) for leaf in leaves) == 1:
            fits = [i for i in fits if not self._is_beside(owners[i])] or fits
        return fits

    def _is_beside(self, name: str) -> bool:
        """Tell whether an argument comes beside the stream: it may be left out, or carries a skip connection."""
        parameter = self._signature.parameters.get(name)
        return (parameter is not None and parameter.default is None) or "skip" in words_of(name)

    def _check_shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any], through: Any, output: Any) -> None:
        pairs = zip(objects.leaves(through), objects.leaves(output), strict=False)
        for given, made in pairs:
            if isinstance(given, Tensor) and isinstance(made, Tensor) and given.shape != made.shape:
                complaint = Observed(self._block, args, kwargs, output).complaint(made, 0)
                raise BlockError(f"{complaint}{reshaped(given, made)}")

    def _stand_ins(self, stated: tuple[str, ...], owned: list[tuple[int, str]], output: Any) -> list[int]:
        """Find what an adapter names, among the numbers of the tensors given and the arguments that they belong to."""
        found = [[i for i, owner in owned if owner == name] for name in stated]
        numbers = [i for numbers in found for i in numbers]
        count = sum(isinstance(leaf, Tensor) for leaf in objects.leaves(output))
        if not all(found) or len(numbers) != count:
            kind, names = type(self._block).__name__, ", ".join(dict.fromkeys(owner for _, owner in owned))
            raise BlockError(
                f"STREAMS[{kind!r}] = {stated!r} does not fit a call that was given tensors as {names or 'nothing'} "
                f"and returned {count}: {described(output)}. Name one for each that it returns, in their order."
            )
        return numbers


def _structure(given: dict[str, Any]) -> tuple[list[Any], tuple[pytree.TreeSpec, tuple[bool, ...]]]:
    leaves, spec = objects.flatten(given)
    # Blocks may return something else where an argument is missing, or a flag is set.
    return leaves, (spec, tuple(leaf is None or leaf is True for leaf in leaves))


def _by_attribute(output: Any, sources: list[int | None], given: dict[str, Any], inputs: list[Any]) -> list[int | None]:
    """Complete the sources of what an object that a block returned holds, from the object that came in.

    That is the one whose other attributes were handed on, or else the only one of its class.
    """
    made, came = objects.flatten_with_paths(output), objects.flatten_with_paths(given)
    if not any(isinstance(path[-1], pytree.GetAttrKey) for path, _ in made if path):
        return sources
    places = {path: i for i, (path, _) in enumerate(came)}
    for position, (path, leaf) in enumerate(made):
        if sources[position] is not None or not isinstance(leaf, Tensor) or not isinstance(path[-1], pytree.GetAttrKey):
            continue
        siblings = [i for i, (other, _) in enumerate(made) if other[:-1] == path[:-1]]
        holders = {came[source][0][:-1] for i in siblings if (source := sources[i]) is not None}
        names = {made[i][0][-1] for i in siblings}
        alike = {p[:-1] for p, _ in came if {q[-1] for q, _ in came if q[:-1] == p[:-1]} == names}
        for candidates in (holders, alike):
            found = {places[place] for holder in candidates if (place := (*holder, path[-1])) in places}
            fits = [i for i in found if isinstance(inputs[i], Tensor) and _same_form(inputs[i], leaf)]
            if len(fits) == 1:
                sources[position] = fits[0]
                break
    return sources


def _same_form(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


_PLAIN = (type(None), bool, int, float, str)


def _choose(output: Tensor, fits: list[int], inputs: list[Any], first: int) -> int | None:
    """Choose the input that an output was made of, among those that fit; `None` where that cannot be told.

    One that fits alone and comes first is the stream. Others have to show it by likeness.
    """
    distinct = [n for i, n in enumerate(fits) if not any(inputs[n] is inputs[m] for m in fits[:i])]
    if len(distinct) == 1 and (distinct[0] == first or torch.compiler.is_compiling()):
        return distinct[0]
    if torch.compiler.is_compiling():  # values are not known
        return None
    (best, chosen), *others = sorted(((_likeness(output, inputs[n]), n) for n in distinct), reverse=True)
    least = others[0][0] + _MARGIN if others else min(_NOISE, 4 / math.sqrt(output.numel() or 1))
    return chosen if best > least else None


def _likeness(one: Tensor, other: Tensor) -> float:
    a, b = one.detach().flatten().float(), other.detach().flatten().float()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 1.0
