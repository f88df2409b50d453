"""The ways of computing weak predictions, and which of them a model allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from stg_hooks.checks import check_choice
from stg_hooks.errors import warn
from stg_hooks.hooks.compiled import compiled_among, is_compiled, surrounding
from stg_hooks.passes.streaming import weights_are_streamed

if TYPE_CHECKING:
    from stg_hooks.passes.caches import Caches
    from stg_hooks.passes.units import Units

EXECUTIONS = ("auto", "sequential", "batched", "full")

# In the order in which one follows where the one before is not possible.
_WAYS = ("batched", "sequential", "full", "all rows")


def check_execution(execution: object) -> None:
    """Raise unless `execution` is one of `EXECUTIONS`."""
    check_choice(f"execution={execution!r}", execution, EXECUTIONS)


class Ways:
    """The way that is taken with one model: the one that was asked for, or the next that the model allows."""

    def __init__(self, model: nn.Module, execution: str, units: Units, caches: Caches) -> None:
        """Take the way that was asked for; change nothing yet.

        Args:
            model: the denoiser.
            execution: one of `EXECUTIONS`.
            units: what its passes are made of.
            caches: its step caches.
        """
        self._model = model
        self._caches = caches
        self._units = units
        self.streams_weights = weights_are_streamed(model)
        """Weights are brought to the device in every pass."""
        self._is_chosen = execution != "auto"
        auto = "batched" if self.streams_weights else "sequential"
        self.now = execution if self._is_chosen else auto
        """One of batched, sequential, full (on the cond rows) and all rows."""
        self._first = self.now
        """Where `choose` begins: a step cache or compiling may be gone in the next `with`."""
        self._surrounding = {way: surrounding(model, units.of(way)) for way in _WAYS}
        self._uncompiled: list[nn.Module] = []
        self._has_told = False

    @property
    def shares(self) -> bool:
        """Whether weak passes share work with the cond pass."""
        return self.now in ("batched", "sequential")

    def choose(self) -> None:
        """Take the next way where the model, as it is now, does not allow the one that was asked for."""
        asked = self._first
        obstacle = advice = ""
        for way in _WAYS[_WAYS.index(asked) :]:
            compiled = compiled_among(self._surrounding[way])
            if self._caches.found is not None and way in ("batched", "sequential"):
                obstacle = f"what a step cache keeps ({self._caches.found.name}) depends on which pass computes it"
            elif compiled is not None:
                obstacle = f"{type(compiled).__name__} is compiled as a whole, so its blocks are not seen from outside"
                advice = " Compile the blocks instead, and it works: for block in model.blocks: block.compile()."
            else:
                break
        self.now = way
        self._uncompiled = [m for m in (*self._units.of(way), *self._surrounding[way]) if not is_compiled(m)]
        if way != asked and self._is_chosen:
            warn(
                f"execution={asked!r}: {obstacle}. Going on with execution={way!r}, which gives the same results; "
                f"execution='auto' asks for that without this warning.{advice}"
            )

    def notice_compiling(self) -> None:
        """Stop sharing where a part was compiled since the way was chosen."""
        if any(map(is_compiled, self._uncompiled)):
            self.stop_sharing("a part of it was compiled inside the `with`")

    def stop_batching(self, error: Exception) -> None:
        """Make weak passes of their own from now on."""
        self._first = self.now = "sequential"
        reason = f"{type(error).__name__}: {error}"
        warn(
            f"the calls of {type(self._model).__name__} cannot be made with more rows ({reason}). Going on "
            "with execution='sequential' instead of 'batched', which gives the same results."
        )

    def stop_sharing(self, reason: str, way: str = "full") -> None:
        """Make weak passes in full from now on."""
        self._first = self.now = way
        self._uncompiled = []
        rows = " and with all rows" if way == "all rows" else ""
        warn(
            f"{type(self._model).__name__} does not let the weak pass share work with the cond pass ({reason}). Weak "
            f"passes are made in full{rows} from now on. execution='full' begins so, without this warning."
        )

    def tell_of_full_passes(self, reason: str) -> None:
        """Say once that there are calls whose weak passes are made in full."""
        if not self._has_told:
            self._has_told = True
            warn(
                f"{type(self._model).__name__} does not let the weak pass share work with the cond pass in some calls "
                f"({reason}). Their weak passes are made in full. execution='full' makes all so, without this warning."
            )

    def stop_cutting(self, reason: str) -> None:
        """Make weak passes on all rows of a call from now on."""
        self._first = self.now = "all rows"
        warn(
            f"the calls of {type(self._model).__name__} cannot be cut down to their cond rows ({reason}). Weak "
            "passes are made with all rows from now on."
        )
