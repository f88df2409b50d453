"""Count floating-point operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from stg_hooks.patching import is_compiled


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# The attention that CPUs run is missing in torch's own table.
_MORE: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of what runs within a `with`, matrix products, convolutions and attention of torch's own.

    Compiled code and foreign kernels are not counted.

    Returns:
        A context manager that gives torch's counter.
    """
    with FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
        yield counter


class CallCounter:
    """Counts the FLOPs of a denoiser's first calls, each with what guidance adds to it.

    The counts of later calls tell more: a first call may fill caches, or find out what can be shared.
    """

    CALLS = 4

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Touch nothing.

        Args:
            modules: the denoisers of one run.
        """
        self._modules = [module for module in modules if not is_compiled_anywhere(module)]
        self.counts: list[int] = []
        """FLOPs, call by call."""
        self._depth = 0
        self._running: ExitStack | None = None
        self._counter: FlopCounterMode | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Count within a `with`; enter it after `apply`, whose work then lies inside each call."""
        with ExitStack() as stack:
            stack.callback(self._stop)
            for module in self._modules:
                stack.enter_context(module.register_forward_pre_hook(self._before, prepend=True))
                stack.enter_context(module.register_forward_hook(self._after, always_call=True))
            yield

    def added_to(self, plain: Sequence[int]) -> float | None:
        """Return how much more the last two calls cost than plain ones, as a part of those; `None` if not counted."""
        base = sum(plain[-2:])
        return sum(self.counts[-2:]) / base - 1 if base and len(self.counts) == len(plain) else None

    def _before(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1 and len(self.counts) < self.CALLS:
            with ExitStack() as stack:
                self._counter = stack.enter_context(counting())
                self._running = stack.pop_all()

    def _after(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._stop()

    def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None and self._counter is not None:
            running.close()
            self.counts.append(int(self._counter.get_total_flops()))


def is_compiled_anywhere(module: nn.Module) -> bool:
    """Tell whether a part of a module is compiled, where counting would not see it."""
    return any(is_compiled(inner) or hasattr(inner, "_orig_mod") for inner in module.modules())
