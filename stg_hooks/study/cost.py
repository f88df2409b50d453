"""Count floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from stg_hooks.hooks.compiled import is_compiled


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# The attention that CPUs run is missing in torch's own table.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flops),
    **flop_registry,
}


class Flops(TorchDispatchMode):
    """Counts the FLOPs of what runs within a `with`: matrix products, convolutions and attention of torch's own.

    The same counts as torch's `FlopCounterMode`, which also follows modules, in several times the time. Compiled code
    and foreign kernels are not counted.
    """

    def __init__(self) -> None:
        """Start at 0."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add what it costs."""
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # some operations come here whole that are made of others
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=output)
        return output


class CallCounter:
    """Counts the FLOPs of a denoiser's first calls, each with what guidance adds to it.

    The counts of later calls tell more: a first call may fill caches, or find out what can be shared.
    """

    CALLS = 4

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Change nothing yet.

        Args:
            modules: the denoisers of one run.
        """
        self._modules = [module for module in modules if not is_compiled_anywhere(module)]
        self.counts: list[int] = []
        """FLOPs, call by call."""
        self._depth = 0
        self._running: ExitStack | None = None
        self._counter: Flops | None = None

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
                self._counter = stack.enter_context(Flops())
                self._running = stack.pop_all()

    def _after(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._stop()

    def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None and self._counter is not None:
            running.close()
            self.counts.append(self._counter.total)


def is_compiled_anywhere(module: nn.Module) -> bool:
    """Tell whether a part of a module is compiled, where counting would not see it."""
    return any(is_compiled(inner) or hasattr(inner, "_orig_mod") for inner in module.modules())
