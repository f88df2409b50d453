"""Tell a layer that adds to its input from a sublayer, to whose output the model adds the input.

When the first is bypassed, its input passes through; when the second is, it adds nothing. A block with a feed-forward
network is of the first kind. Others, bare attention above all, may be of either, which one trial tells.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from stg_hooks.errors import BlockError
from stg_hooks.model.attention import is_attention
from stg_hooks.model.objects import copied

# A trial gives a layer noise this many times as large as its input. What normalises and projects its input gives little
# of it back, and in other directions; a residual connection gives back all of it.
_LOUDNESS = 16.0
_IN = 0.5  # least cosine with the noise, and least part of it, of an output that contains its input
_OUT = 0.35  # most of both where it does not

_Relation = Literal["contains its input", "does not", "unclear"]


def passed_or_zeros(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], through: Any, memory: dict[str, Any]
) -> Any:
    """Return what a layer that may be a sublayer gives when it is bypassed.

    Args:
        module: the layer.
        args: positional arguments of its call.
        kwargs: keyword arguments of its call.
        through: what it would return if every stream left it as it entered.
        memory: what is known of the layer, from one call to the next.

    Returns:
        `through` for what contains its input; zeros for a sublayer.

    Raises:
        BlockError: it is attention, and its output neither contains its input nor clearly does not; or the model does
            something else with a sublayer's output than add it.
    """
    if "relation" not in memory:
        streams = [leaf for leaf in pytree.tree_leaves(through) if isinstance(leaf, Tensor)]
        if not torch.compiler.is_compiling() and not all(bool(leaf.isfinite().all()) for leaf in streams):
            return through  # a trial would tell nothing; what was let go of a shared prefix is NaN, too
        find = torch.compiler.disable(_find) if torch.compiler.is_compiling() else _find
        find(module, args, kwargs, through, memory)
    if memory["relation"] == "contains its input":
        return through
    if memory.get("is added") or torch.compiler.is_compiling():
        return pytree.tree_map_only(Tensor, torch.zeros_like, through)
    return pytree.tree_map_only(Tensor, lambda stream: _SublayerZeros.like(stream, module, memory), through)


def _find(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], through: Any, memory: dict[str, Any]
) -> None:
    relation = _relation(module, args, kwargs, through)
    if relation == "unclear":
        if is_attention(module):
            raise BlockError(
                f"{type(module).__name__} computes attention, and one trial does not tell whether its output contains "
                "its input or the model adds that to it, so what bypassing it means is not known. Skip another layer, "
                f"or say what it gives.\n{_lines(through)}"
            )
        relation = "contains its input"  # as blocks do
    memory["relation"] = relation


def _relation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], through: Any) -> _Relation:
    streams = [leaf for leaf in pytree.tree_leaves(through) if isinstance(leaf, Tensor)]
    noise = {id(stream): _noise(stream) for stream in streams}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    loud = [leaf + noise[id(leaf)] if id(leaf) in noise else leaf for leaf in leaves]
    own_args, own_kwargs = copied(*pytree.tree_unflatten(loud, spec))
    devices = {stream.device for stream in streams if stream.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            output = _replica(module).forward(*own_args, **own_kwargs)
    except Exception:  # in a call that the caller did not make
        return "unclear"
    given = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not streams or [leaf.shape for leaf in given] != [stream.shape for stream in streams]:
        return "unclear"
    relations = {_compared(leaf, noise[id(stream)]) for leaf, stream in zip(given, streams, strict=True)}
    return relations.pop() if len(relations) == 1 else "unclear"


def _noise(stream: Tensor) -> Tensor:
    generator = torch.Generator(stream.device).manual_seed(0)  # none of the caller's random numbers
    noise = torch.randn(stream.shape, generator=generator, device=stream.device, dtype=torch.float32)
    size = stream.detach().float().square().mean().sqrt()
    return (noise * _LOUDNESS * torch.where(size > 0, size, 1.0)).to(stream.dtype)


def _compared(output: Tensor, noise: Tensor) -> _Relation:
    a, b = output.detach().flatten().float(), noise.flatten().float()
    along, size, loudness = float(a @ b), float(a.norm()), float(b.norm())
    cosine = along / (size * loudness) if size else 0.0
    part = along / loudness**2
    if cosine > _IN and part > _IN:
        return "contains its input"
    return "does not" if abs(cosine) < _OUT and abs(part) < _OUT else "unclear"


def _replica(module: nn.Module) -> nn.Module:
    """Copy a module with what it keeps besides its parameters, which are shared."""
    copies: dict[int, Any] = {id(inner): inner.__new__(type(inner)) for inner in module.modules()}

    def own(value: Any) -> Any:
        if id(value) in copies:
            return copies[id(value)]
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return value.detach().clone()
        if isinstance(value, dict):
            fresh = value.copy()
            fresh.update({key: own(inner) for key, inner in value.items()})
            return fresh
        if type(value) in (list, set, tuple):
            return type(value)(map(own, value))
        return value

    for inner in module.modules():
        state = inner.__getstate__()  # without what is installed on it just now
        copies[id(inner)].__dict__.update({name: own(value) for name, value in state.items()})
    replica: nn.Module = copies[id(module)]
    return replica


class _SublayerZeros(Tensor):
    """What a bypassed sublayer gives: zeros that make sure that the model adds them to something."""

    _module: nn.Module
    _memory: dict[str, Any]

    @classmethod
    def like(cls, stream: Tensor, module: nn.Module, memory: dict[str, Any]) -> _SublayerZeros:
        return cls._of(torch.zeros_like(stream).detach(), module, memory)

    @classmethod
    def _of(cls, zeros: Tensor, module: nn.Module, memory: dict[str, Any]) -> _SublayerZeros:
        nothing = zeros.as_subclass(cls)
        nothing._module, nothing._memory = module, memory
        return nothing

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            was_written = any(bool(nothing.any()) for nothing in found)
            output = func(*args, **kwargs)
            made = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            is_nothing = not any(bool(leaf.any()) for leaf in made)
        if not found or was_written or not any(leaf.is_floating_point() for leaf in made):
            return pytree.tree_map_only(cls, _plain, output)
        module, memory = found[0]._module, found[0]._memory
        if is_nothing and func not in _MIXES:  # moved, scaled, projected
            return pytree.tree_map_only(Tensor, lambda leaf: cls._of(leaf, module, memory), output)
        if getattr(func, "__name__", "") not in _ADDS:
            raise BlockError(
                f"{type(module).__name__} does not add to its input, and the model does not simply add what it gives: "
                f"it comes to {getattr(func, '__name__', func)!r}. So what bypassing it means is not known. Skip "
                f"another layer, or say what it gives.\n{_lines(args[0])}"
            )
        memory["is added"] = True
        return pytree.tree_map_only(cls, _plain, output)


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


_ADDS = ("add", "add_", "__add__", "__iadd__", "__radd__", "addcmul", "addcmul_", "sub", "__sub__", "__rsub__")
_MIXES = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


def _lines(through: Any) -> str:
    """Write what to type, for either meaning."""
    hand = "call.streams.passed_through(call.forward, call.args, call.kwargs)"
    zeros = f"torch.zeros_like({hand})" if isinstance(through, Tensor) else f"tuple(map(torch.zeros_like, {hand}))"
    return (
        f"  stg.skip(model, layers, mode=lambda call: {hand})   # its input passes through\n"
        f"  stg.skip(model, layers, mode=lambda call: {zeros})   # adds nothing"
    )
