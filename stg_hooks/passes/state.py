"""What a model kept at one time, and how it is put back."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.errors import CallError
from stg_hooks.passes.altering import may_alter
from stg_hooks.passes.effects import count_of_writes
from stg_hooks.passes.holders import MISSING, Attributes, Contents, Holder, Items
from stg_hooks.passes.walk import KNOWN_LIBRARIES, NUMBERS, STATELESS, Walk, library_of, replaced_forward, serial

_LARGE = 1 << 20  # entries
_LOOKS = 4


class Snapshot:
    """What a model kept at one time."""

    def __init__(
        self,
        walk: Walk,
        contents: list[Contents] | None,
        values: list[Any] | None,
        copies: Callable[[Tensor], Tensor | None],
    ) -> None:
        """Take what is there now; `contents` and `values` are known where nothing has changed its place."""
        self.walk = walk
        self.contents = [holder.read() for holder in walk.holders] if contents is None else contents
        self.values = walk.values() if values is None else values
        self.writes = [count_of_writes(tensor) for tensor in walk.tensors]
        self.copies = {id(tensor): copies(tensor) for tensor in walk.tensors}

    def mark(self) -> Hashable:
        """Return a fingerprint that changes when the model's structure or settings do.

        Of tensors it is told whether they were written into, and no values.
        """

        def marked(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(map(marked, value))
            # With the type, because `1 == True == 1.0`.
            return (type(value), value if isinstance(value, NUMBERS) else serial(value))

        held = [tuple(map(marked, (*contents.keys(), *contents.values()))) for contents in self.contents]
        return self.walk.mark(), tuple(held)

    def is_in_place(self) -> bool:
        """Tell whether all containers hold the same objects still."""
        now, values = self.walk.values(), self.values
        return (
            now is not None and values is not None and len(now) == len(values) and all(map(operator.is_, now, values))
        )

    def written(self) -> list[Tensor]:
        """List the tensors that were written into since."""
        pairs = zip(self.walk.tensors, self.writes, strict=True)
        return [tensor for tensor, writes in pairs if self._is_written(tensor, writes)]

    def _is_written(self, tensor: Tensor, writes: object) -> bool:
        if not tensor.is_inference():
            return bool(count_of_writes(tensor) != writes)
        copy = self.copies[id(tensor)]  # torch does not count writes in inference mode
        return copy is not None and tensor.device.type != "meta" and not torch.equal(tensor, copy)

    def differs(self) -> bool:
        """Tell whether anything is different now."""
        if self.written():
            return True
        if self.is_in_place():
            return False
        pairs = zip(self.walk.holders, self.contents, strict=True)
        return bool(self.walk.added()) or any(not _same(contents, holder.read()) for holder, contents in pairs)

    def changes(self) -> list[tuple[Holder, Any, Any]]:
        """List what holds other tensors now than it did: where, under which key, and what is there."""
        found: list[tuple[Holder, Any, Any]] = []
        if self.is_in_place():
            return found
        found = [(Attributes(v), key, v[key]) for v, key in self.walk.added() if _has_tensors(v[key])]
        for holder, contents in zip(self.walk.holders, self.contents, strict=True):
            if isinstance(holder, Items) and isinstance(holder.owner, set):
                continue
            for key, value in holder.read().items():
                if contents.get(key, MISSING) is not value and _has_tensors(value):
                    found.append((holder, key, value))
        return found

    def has_new_tensors(self) -> bool:
        """Tell whether tensors were written into since, or put where there was something else."""
        pairs = zip(self.walk.holders, self.contents, strict=True)
        return bool(self.written()) or any(
            contents.get(key, MISSING) is not value and _has_tensors(value)
            for holder, contents in pairs
            for key, value in holder.read().items()
        )

    def put_back(self) -> None:
        """Make everything what it was.

        Raises:
            CallError: a tensor was written into of which no copy was made.
        """
        if not self.is_in_place():
            for holder, contents in zip(self.walk.holders, self.contents, strict=True):
                if not _same(contents, holder.read()):
                    holder.write(contents)
            for values, key in self.walk.added():
                del values[key]
        for tensor in self.written():
            copy = self.copies[id(tensor)]
            if copy is None:
                raise CallError(
                    f"the model wrote into a buffer of shape {tuple(tensor.shape)}, which it did not do in the calls "
                    "before: its values are lost, and the weak pass needs them. Keep a new tensor instead."
                )
            with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
                tensor.copy_(copy)


class Kept:
    """What one model keeps; looked at around every call that is guided."""

    def __init__(self, model: nn.Module, with_buffers: bool = True) -> None:
        """Change nothing yet.

        Args:
            model: the denoiser.
            with_buffers: not where offloading hooks move buffers about.
        """
        self._model = model
        self._modules = list(model.modules())
        self._with_buffers = with_buffers
        self._last: Snapshot | None = None
        self._looks = 0
        self._written: set[int] = set()

    def look(self, before: Snapshot | None = None) -> Snapshot:
        """Take what the model keeps now; of what has not been written into since `before`, that one's copy is used.

        Returns:
            A new snapshot; `before` itself where nothing has changed.
        """
        self._looks += 1
        last = before or self._last
        changed = set() if last is None else {id(tensor) for tensor in last.written()}
        if before is not None:
            self._written |= changed

        def copied(tensor: Tensor) -> Tensor | None:
            # Tables and the like are copied once, and not in every call.
            copy = None if last is None or id(tensor) in changed else last.copies.get(id(tensor))
            if copy is not None or (before is not None and id(tensor) in before.copies and id(tensor) not in changed):
                return copy
            is_large = tensor.numel() > _LARGE and id(tensor) in walk.buffers
            if is_large and self._looks > _LOOKS and id(tensor) not in self._written:
                return None
            return tensor.detach().clone()

        if last is not None and last.is_in_place():
            if before is not None and not changed:
                return before
            walk = last.walk
            self._last = Snapshot(walk, last.contents, last.values, copied)
        else:
            walk = Walk(self._modules, self._with_buffers)
            self._last = Snapshot(walk, None, None, copied)
        return self._last

    def has_opaque(self) -> bool:
        """Tell whether it keeps objects into which Python cannot look."""
        return self._last is not None and self._last.walk.has_opaque

    def replaced(self) -> list[str]:
        """Name the modules whose `forward` was replaced from outside, each with the function that replaces it."""
        names = []
        for name, module in self._model.named_modules():
            function = replaced_forward(module)
            if function is not None:
                what = getattr(function, "__qualname__", type(function).__qualname__)
                names.append(f"{name or type(module).__name__}.forward is {_module_of(function)}.{what}")
        return names

    def hooked(self) -> list[str]:
        """Name the modules with hooks, neither ours nor a known library's, that may change what passes through them."""
        names = []
        for name, module in self._model.named_modules():
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                own = getattr(hook, "func", hook)
                if library_of(own) not in KNOWN_LIBRARIES | {"diffusers"} and may_alter(own):
                    what = getattr(own, "__qualname__", type(own).__qualname__)
                    names.append(f"{name or type(module).__name__} has the hook {_module_of(own)}.{what}")
        return names


class Copies:
    """What a branch of its own has left behind, for the steps in which a step cache computes less."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._places: dict[tuple[int, Any], tuple[Holder, Any]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._places or self._tensors)

    def keep(self, start: Snapshot) -> None:
        """Keep what a weak pass that has begun at `start` has left."""
        for holder, key, value in start.changes():
            self._places[_place(holder), key] = holder, value
        for tensor in start.written():
            self._tensors[id(tensor)] = tensor, tensor.detach().clone()

    def use(self, before: Snapshot, after: Snapshot) -> bool:
        """Put what was kept where the cond pass between two looks has changed nothing; tell if there is any."""
        used = False
        old = {_place(holder): contents for holder, contents in zip(before.walk.holders, before.contents, strict=True)}
        new = {_place(holder): contents for holder, contents in zip(after.walk.holders, after.contents, strict=True)}
        for (owner, key), (holder, value) in self._places.items():
            if old.get(owner, {}).get(key, MISSING) is new.get(owner, {}).get(key, MISSING):
                holder.write({**holder.read(), key: value})
                used = True
        writes = dict(zip(map(id, before.walk.tensors), before.writes, strict=True))
        later = dict(zip(map(id, after.walk.tensors), after.writes, strict=True))
        for tensor, copy in self._tensors.values():
            if id(tensor) in writes and writes[id(tensor)] == later.get(id(tensor)):
                with torch.no_grad():
                    tensor.copy_(copy)
                used = True
        return used


def _place(holder: Holder) -> int:
    return id(holder.mapping if isinstance(holder, Attributes) else holder.owner)


def _same(a: Contents, b: Contents) -> bool:
    def equal(x: object, y: object) -> bool:
        return x is y or (isinstance(x, NUMBERS) and type(x) is type(y) and x == y)

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def _module_of(function: Any) -> str:
    return str(getattr(function, "__module__", type(function).__module__))


def _has_tensors(value: object, depth: int = 4) -> bool:
    if isinstance(value, Tensor):
        return True
    if not depth or isinstance(value, STATELESS):
        return False
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, deque)) else ()
    return any(_has_tensors(one, depth - 1) for one in (*inner, *getattr(value, "__dict__", {}).values()))
