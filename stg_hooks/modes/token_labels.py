"""Follow tensors through a call: which of its arguments a tensor comes from, and which of its tokens are text.

Tells self-attention (queries and keys come from the same tokens) from cross-attention, also where their lengths happen
to agree, and finds the text among the tokens of a joint attention, on whichever side a model puts it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stg_hooks.model import objects
from stg_hooks.model.source import is_positional, words_of

# What the argument that carries text, or whatever else is not denoised, is called.
_TEXT_WORDS = words_of(
    "encoder text texts txt context contexts prompt prompts caption captions cond conds uncond condition conditions "
    "conditional conditioning"
)

Runs = tuple[tuple[bool | tuple[bool, ...], int], ...]
"""Consecutive tokens: whether they are text (with an entry per row, where rows differ), and how many."""


NOTHING: Mapping[str, Runs] = {}


@dataclasses.dataclass(frozen=True)
class Label:
    """Where a tensor comes from."""

    sources: frozenset[str]
    """Names of the arguments of the call that it was computed from."""
    runs: Runs = ()
    """Its tokens in order, where tokens of several kinds were put together."""
    product: tuple[frozenset[str], frozenset[str]] | None = None
    """Where the two factors of a matrix product come from, for the product and what is computed from it."""

    def runs_along(self, size: int) -> Runs:
        """Return the runs if they describe a dimension of this size."""
        return self.runs if sum(count for _, count in self.runs) == size else ()

    def runs_along_any(self, tensor: Tensor) -> bool:
        """Tell whether the runs describe a dimension of this tensor."""
        return any(self.runs_along(size) for size in tensor.shape)


class Provenance:
    """The labels of the tensors inside one call, and inside the calls that it makes."""

    def __init__(self) -> None:
        """Start without labels."""
        self._labels: dict[int, tuple[weakref.ref[Tensor], Label]] = {}
        self.arguments: dict[str, Tensor] = {}
        """The tensors that the innermost call was given and that carry tokens."""
        self.main: str | None = None
        """The name of the one among them that carries what is being denoised."""

    @contextmanager
    def call(self, arguments: dict[str, Any], known: Mapping[str, Runs] = NOTHING) -> Iterator[list[Any]]:
        """Follow what is computed inside a call from its own arguments.

        Args:
            arguments: name to value.
            known: name to runs, where these are known already; one run of text for what holds nothing else.

        Returns:
            A context manager that gives a list: put the output of the call there.
        """
        outer, outer_arguments, outer_main = self._labels, self.arguments, self.main
        self._labels, self.arguments = {}, {}
        output: list[Any] = []
        before: list[Label] = []
        others: list[str] = []  # what is known not to come from what is denoised
        try:
            for name, leaf in named_tensors(arguments):
                label = _label_of(outer, leaf)
                before += [] if label is None else [label]
                if carries_tokens(name, leaf) and not any(leaf is a for a in self.arguments.values()):
                    self.arguments.setdefault(name, leaf)
                    runs = label.runs if label else known.get(name, ())
                    is_other = label is not None and outer_main not in (None, *label.sources)
                    others += [name] if is_other or is_text_only(runs) else []
                    self._set(leaf, Label(frozenset([name]), () if is_text_only(runs) else runs))
            self.main = _main([*self.arguments], others)
            yield output
            inner = [(tensor, self.label(tensor)) for tensor in objects.leaves(output) if isinstance(tensor, Tensor)]
        finally:
            self._labels, self.arguments, self.main = outer, outer_arguments, outer_main
        sources = frozenset[str]().union(*(label.sources for label in before))
        for tensor, label in inner:
            self._set(tensor, Label(sources, label.runs if label else ()))

    def label(self, tensor: Tensor) -> Label | None:
        """Return where a tensor comes from; `None` where that is not known."""
        return _label_of(self._labels, tensor)

    def follow(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Label what a torch function has returned."""
        given = list(_tensors((*args, *kwargs.values())))
        labels = [label for label in map(self.label, given) if label is not None]
        if not labels:
            return
        sources = frozenset[str]().union(*(label.sources for label in labels))
        if function is Tensor.__setitem__:
            own = self.label(given[0])
            self._set(given[0], Label(sources, own.runs if own else ()))
            return
        product = next((label.product for label in labels if label.product), None)
        if function in _PRODUCTS and len(labels) > 1:
            product = labels[-2].sources, labels[-1].sources
        for tensor in _tensors((output,)):
            if function in _JOINS:
                runs = self._joined(given, tensor)
            else:
                runs = next(filter(None, (_carried(label.runs, one, tensor) for one, label in self._known(given))), ())
            self._set(tensor, Label(sources, runs, product))

    def _known(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Label]]:
        for tensor in tensors:
            label = self.label(tensor)
            if label is not None and label.runs:
                yield tensor, label

    def _joined(self, parts: list[Tensor], whole: Tensor) -> Runs:
        parts = [part for part in parts if part.ndim == whole.ndim]
        changed = [dim for dim in range(whole.ndim) if any(part.shape[dim] != whole.shape[dim] for part in parts)]
        if len(changed) != 1:
            return ()
        runs: list[tuple[bool | tuple[bool, ...], int]] = []
        for part in parts:
            size, label = part.shape[changed[0]], self.label(part)
            known = label.runs_along(size) if label is not None else ()
            runs += known or ((label is None or self.main not in label.sources, size),)
        # Joined along another dimension, or all of one kind: then the tokens need not be told apart.
        if len({is_text for is_text, _ in runs}) > 1:
            return tuple(runs)
        return next((label.runs for _, label in self._known(parts) if label.runs_along_any(whole)), ())

    def _set(self, tensor: Tensor, label: Label) -> None:
        self._labels[id(tensor)] = weakref.ref(tensor), label


_PRODUCTS = (
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
    Tensor.baddbmm,
)
_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.hstack)


def named_tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name each tensor among arguments; those in lists and dictionaries by their places, as `args[0]`."""
    for name, value in arguments.items():
        for path, leaf in objects.flatten_with_paths(value):
            if isinstance(leaf, Tensor):
                yield f"{name}{pytree.keystr(path)}", leaf


def _label_of(labels: dict[int, tuple[weakref.ref[Tensor], Label]], tensor: Tensor) -> Label | None:
    found = labels.get(id(tensor))
    return found[1] if found is not None and found[0]() is tensor else None  # ids are used again


def carries_tokens(name: str, tensor: Tensor) -> bool:
    """Tell whether an argument of a block or of attention may hold tokens."""
    return tensor.is_floating_point() and tensor.ndim > 1 and not is_positional(name) and "mask" not in name


def is_text_only(runs: Runs) -> bool:
    """Tell whether all tokens are text."""
    return bool(runs) and all(kind is True for kind, _ in runs)


def _main(names: list[str], others: list[str]) -> str | None:
    """Choose what is being denoised among arguments, some of which are known to carry something else."""
    candidates = [name for name in names if not sounds_like_text(name)]
    return next((name for name in candidates if name not in others), next(iter(candidates or names), None))


def sounds_like_text(name: str) -> bool:
    """Tell whether an argument of this name carries text, or whatever else is not denoised."""
    return not _TEXT_WORDS.isdisjoint(words_of(name))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _carried(runs: Runs, given: Tensor, made: Tensor) -> Runs:
    """Say which tokens a tensor holds that was computed from another one: all, or those of a slice."""
    total = sum(count for _, count in runs)
    if given.ndim == made.ndim and given.untyped_storage().data_ptr() == made.untyped_storage().data_ptr():
        cut = [dim for dim in range(given.ndim) if given.shape[dim] != made.shape[dim]]
        if len(cut) == 1 and cut[0] == _index(given, total) and given.stride() == made.stride():
            start = (made.storage_offset() - given.storage_offset()) // given.stride(cut[0])
            return part_of(runs, start, start + made.shape[cut[0]])
    if total in made.shape:
        return runs
    # Rows that lie one after the other hold the same runs each.
    is_flat = total in given.shape[1:2] and made.ndim == given.ndim - 1 and made.shape[0] == given.shape[0] * total
    is_as_before = given.shape[:1] == made.shape[:1] and total > 0 and given.shape[0] % total == 0
    return runs if is_flat or is_as_before else ()


def _index(tensor: Tensor, size: int) -> int | None:
    return tensor.shape.index(size) if size in tensor.shape else None


def part_of(runs: Runs, start: int, stop: int) -> Runs:
    """Return the runs of some of the tokens."""
    kept: list[tuple[bool | tuple[bool, ...], int]] = []
    position = 0
    for is_text, count in runs:
        size = min(stop, position + count) - max(start, position)
        if size > 0:
            kept.append((is_text, size))
        position += count
    return tuple(kept)
