"""Count FLOPs, measure time and peak memory, and say what machine this is."""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Way = tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]
"""What to time, and what to enter around it, untimed."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Turn(NamedTuple):
    """Seconds of a call, and of the reference before and after it."""

    before: float
    own: float
    after: float


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# The attention that CPUs run is missing in torch's own table.
_MORE = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
        yield counter


def flops(call: Callable[[], Any]) -> int:
    """Count the FLOPs of a call."""
    with counting() as counter:
        call()
    return int(counter.get_total_flops())


def flops_of(layers: Sequence[nn.Module], call: Callable[[], Any]) -> tuple[int, list[int], list[int]]:
    """Count FLOPs of a call, layer by layer.

    Returns:
        All FLOPs; for each layer its own; for each layer those of everything that runs after it.
    """
    starts, ends = [0] * len(layers), [0] * len(layers)
    with counting() as counter:

        def note(into: list[int], i: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                into[i] = int(counter.get_total_flops())

            return hook

        handles = [layer.register_forward_pre_hook(note(starts, i)) for i, layer in enumerate(layers)]
        handles += [layer.register_forward_hook(note(ends, i)) for i, layer in enumerate(layers)]
        try:
            call()
        finally:
            for handle in handles:
                handle.remove()
        total = int(counter.get_total_flops())
    return total, [end - start for start, end in zip(starts, ends, strict=True)], [total - end for end in ends]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes in tensors that operations have made and something still holds, and their peak.

    The same on every machine and in every run. Scratch memory inside an operation is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(tensor.untyped_storage()) for tensor in _plain_tensors((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        for tensor in _plain_tensors(output):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in given:  # a view of something, otherwise
                self._live[storage] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self._live.values()))
        return output


def _plain_tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if type(t) in (Tensor, nn.Parameter) and not t.is_meta]


def peak_memory(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    """Run a call, and find how many bytes more than before were in use at once: activations, and whatever is kept.

    On a GPU torch counts what it allocates; elsewhere the tensors are counted.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as counter:
        result = call()
    return result, counter.peak


def hidden_state_bytes(layer: nn.Module, call: Any) -> int:
    """Measure what flows between two blocks."""
    sizes = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        streams = output if isinstance(output, tuple) else (output,)
        sizes.append(sum(stream.numel() * stream.element_size() for stream in streams if isinstance(stream, Tensor)))

    handle = layer.register_forward_hook(look, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return sizes[0]


def in_turns(
    calls: Mapping[str, Way],
    reference: Way,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    enough: Callable[[list[Turn]], bool] = lambda turns: len(turns) >= 10,
) -> dict[str, list[Turn]]:
    """Time calls, each between two of a reference: `r a r b r c r`, in an order that is drawn anew for each round.

    A machine that others use as well changes its speed by tens of per cent, but mostly within seconds, not within one
    step: what is compared has to be run side by side.

    Args:
        calls: by name, what to time, and what to enter around it, untimed.
        reference: what they are compared with.
        device: where it runs.
        clock: tells seconds.
        enough: told of the turns of one contestant after each; ends them where it says so.

    Returns:
        The turns of each.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in calls}

    def seconds(way: Way) -> float:
        call, session = way
        gc.collect()
        with session():
            synchronize(device)
            start = clock()
            call()
            synchronize(device)
            return clock() - start

    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # what is here to stay is not looked through again and again
    gc.disable()
    try:
        before, open_ones = seconds(reference), list(calls)
        while open_ones:
            shuffle(open_ones)
            for name in open_ones:
                own, after = seconds(calls[name]), seconds(reference)
                turns[name].append(Turn(before, own, after))
                before = after
            open_ones = [name for name in open_ones if not enough(turns[name])]
    finally:
        gc.enable()
        gc.unfreeze()
    return turns


def steady(turns: Sequence[Turn], share: float = 0.25) -> list[Turn]:
    """Leave out the quarter of the turns in which the machine changed its speed most between the reference calls.

    The rule does not look at what is compared with them, so it cannot favour any contestant.
    """
    kept = sorted(turns, key=lambda turn: abs(math.log(turn.after / turn.before)))
    return kept[: max(2, round(len(kept) * (1 - share)))]


def ratio(turns: Sequence[Turn]) -> float:
    """Return how much longer than the reference something takes: the geometric mean of its turns."""
    return math.exp(statistics.fmean(math.log(t.own) - math.log(t.before * t.after) / 2 for t in turns))


def added(turns: Sequence[Turn]) -> float:
    """Return the seconds that something takes more than the reference: the median of its turns."""
    return statistics.median(t.own - (t.before + t.after) / 2 for t in turns)


def pin() -> bool:
    """Keep this process on one core, the one that has been idle most; tell whether that can be done here."""
    if not hasattr(os, "sched_setaffinity"):
        return False

    def idle() -> dict[int, int]:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if re.match(r"cpu\d", line)]
        return {int(name[3:]): int(times[3]) for name, *times in lines}

    before = idle()
    time.sleep(1.0)
    after = idle()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0), key=lambda core: after[core] - before[core])})
    return True


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def estimate(statistic: Callable[..., float], *turns: Sequence[Turn], draws: int = 2000) -> dict[str, float]:
    """Estimate a statistic of turns, of one contestant or more, with the interval that holds 95 % of resampled ones."""
    generator = random.Random(0)
    found = sorted(statistic(*(generator.choices(own, k=len(own)) for own in turns)) for _ in range(draws))
    return {
        "value": statistic(*turns),
        "low": found[int(0.025 * draws)],
        "high": found[min(draws - 1, int(0.975 * draws))],
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Name what the numbers depend on; nothing that says whose machine it is."""
    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return facts


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
