"""Notice what goes wrong silently in guided calls, without waiting for a GPU."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from stg_hooks.errors import LayerError, warn
from stg_hooks.modes.switch import Switch
from stg_hooks.step import Step


@dataclasses.dataclass
class _Look:
    """What a guided call was asked, on its way to the CPU: which predictions are not finite, which equal cond."""

    where: str
    names: list[str]
    switches: Sequence[Switch]
    flags: Tensor
    event: Any

    def has_arrived(self) -> bool:
        return self.event is None or self.event.query()

    def answers(self) -> tuple[list[bool], list[bool]]:
        if self.event is not None:
            self.event.synchronize()
        values = self.flags.tolist()
        return values[: len(self.names)], values[len(self.names) :]


class Watch:
    """Looks at guided calls for weak predictions that equal cond bit for bit, and for predictions that are not finite.

    Both are computed where the predictions are, a few small reductions per call. On a GPU the answers, one byte each,
    are copied to the CPU asynchronously, and read in a later call that finds them arrived (an event tells), or when
    `report` is told to wait, as at the end of a `with`. So nothing synchronises with the GPU in between.
    """

    def __init__(self, name: str, strict: bool = False) -> None:
        """Start with nothing seen.

        Args:
            name: what to call the user's own call in messages.
            strict: raise where a skip changed nothing, in the first call of its kind: synchronise with the GPU there.
        """
        self._name = name
        self.target = "model"
        """What the user has in hand, for messages: a model, or the pipeline around it."""
        self.strict = strict
        self._lock = threading.Lock()
        self._pending: deque[_Look] = deque()
        self._seen: dict[Hashable, tuple[Switch, int, int]] = {}
        self._told: set[Hashable] = set()
        self._has_told_not_finite = False
        self._calls = 0

    def forget(self) -> None:
        """Start afresh, also with what has been told."""
        with self._lock:
            for switch, *_ in self._seen.values():
                switch.forget()
            self._pending.clear()
            self._seen.clear()
            self._told.clear()
            self._has_told_not_finite = False
            self._calls = 0

    def look(
        self,
        step: Step,
        conds: Sequence[Tensor],
        unconds: Sequence[Tensor | None] = (),
        switches: Sequence[Switch | None] = (),
        weaks: Sequence[Sequence[Tensor]] = (),
        unskipped: Sequence[Sequence[Tensor] | None] | None = None,
    ) -> None:
        """Look at what was predicted in a guided call; report, once, what turns out not to be finite.

        Args:
            step: where in the run the call was made.
            conds: the predictions with the prompt.
            unconds: those without it, where there are any.
            switches: the branches; `None` for those that are computed, and reported, on another rank.
            weaks: for each branch, the weak predictions; none where they replace the uncond ones.
            unskipped: for each branch, what weak predictions that skip nothing are, bit for bit; `None` where that is
                not known, because the call's own ones were made with more rows. Left out, these are the cond ones.

        Raises:
            LayerError: with `strict`, a skip changed nothing in this call or one before.
        """
        own = [switch for switch in switches if switch is not None]
        plain = [conds] * len(weaks) if unskipped is None else unskipped
        made = list(zip(weaks, plain, switches, strict=False))
        weaks = [weak for weak, _, switch in made if switch is not None]
        compared = [(weak, c, switch) for weak, c, switch in made if switch is not None and c is not None]
        with torch.no_grad():
            known = [u for u in unconds if u is not None]
            named = [("cond", conds), *([("uncond", known)] if known else []), *(("weak", weak) for weak in weaks)]
            flags = [~_all([t.isfinite().all() for t in tensors]) for _, tensors in named if tensors]
            for ours, others, _ in compared:
                flags.append(_all([(w == c).all() for w, c in zip(ours, others, strict=True)]))
            names = [name for name, tensors in named if tensors]
            found = _sent(torch.stack(flags)) if flags else None
        with self._lock:
            is_new = any(switch.key not in self._seen for switch in own)
            for switch in own:
                self._seen[switch.key] = switch, *self._seen.get(switch.key, (switch, 0, 0))[1:]
            self._calls += bool(conds)
            if found is not None:
                self._pending.append(_Look(self._where(step), names, [switch for *_, switch in compared], *found))
        if self.strict:
            self.report(wait=is_new)
        else:
            self._read(wait=False)

    def _where(self, step: Step) -> str:
        if step.index is None:
            return f"guided call {self._calls}" + ("" if step.sigma is None else f" (sigma {step.sigma:.4g})")
        return f"step {step.index}" + (f" of {step.count}" if step.count else "") + " (counted from 0)"

    def _read(self, wait: bool) -> None:
        report = None
        with self._lock:
            while self._pending and (wait or self._pending[0].has_arrived()):
                look = self._pending.popleft()
                not_finite, same = look.answers()
                for switch, is_same in zip(look.switches, same, strict=True):
                    _, calls, equal = self._seen[switch.key]
                    self._seen[switch.key] = switch, calls + 1, equal + is_same
                names = list(dict.fromkeys(n for n, bad in zip(look.names, not_finite, strict=True) if bad))
                if names and not self._has_told_not_finite:
                    self._has_told_not_finite = True
                    report = f"the {' and '.join(names)} prediction in {look.where}"
        if report:
            text = (
                f"{self._name}: {report} is not finite (NaN or infinity). It is passed on as it is, and this is said "
                "once. If the plain model gives none, try a lower scale or another precision."
            )
            warn(text)

    def report(self, wait: bool) -> None:
        """Report branches that did nothing, each once.

        Args:
            wait: for what is still being computed on a GPU; otherwise that is left for the next time.

        Raises:
            LayerError: with `strict`, instead of a warning.
        """
        self._read(wait)
        found = []
        with self._lock:
            for key, (switch, calls, equal) in self._seen.items():
                complaint = None if key in self._told else switch.complaint(equal, calls)
                if complaint:
                    self._told.add(key)
                    found.append(complaint)
        if not found:
            return
        text = f"{self._name}: {'; '.join(found)}. Choose other layers: stg.layers({self.target})."
        if self.strict:
            raise LayerError(text)
        warn(text)


def _all(flags: Sequence[Tensor]) -> Tensor:
    return flags[0] if len(flags) == 1 else torch.stack(list(flags)).all()


def _sent(flags: Tensor) -> tuple[Tensor, Any] | None:
    """Send flags to the CPU; return where they will be and what tells of their arrival. `None`: without values."""
    kind = flags.device.type
    if type(flags) is not Tensor or kind == "meta":
        return None
    backend: Any = getattr(torch, kind)
    if kind == "cpu" or not hasattr(backend, "Event"):
        return flags, None
    if kind == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # a graph that is replayed later cannot tell us
    with torch.cuda.device(flags.device) if kind == "cuda" else nullcontext():
        host = flags.to("cpu", non_blocking=True)  # into pinned memory
        event = backend.Event()
        event.record()
    return host, event
