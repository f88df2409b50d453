"""Tell which modules compute attention: by their projections, norms, names and code."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Collection

from torch import nn

from stg_hooks.model.called import calls_attention
from stg_hooks.model.facts import stated
from stg_hooks.model.source import words_of

# Children that hold the projections of an attention: one set of these names is enough to recognise one.
_PROJECTIONS = (
    {"to_q", "to_k"},
    {"to_qkv"},
    {"q_proj", "k_proj"},
    {"qkv_proj"},
    {"q", "k", "v"},
    {"qkv"},
    {"wq", "wk"},
    {"query", "key"},
    {"query_key_value"},
    {"in_proj_weight"},
)
# What the projections of attention are called, in parts of their names.
_ATTENTION_WORDS = words_of(
    "q k v o qkv kv qk wq wk wv wo query key value to proj projection out attn attention query_key_value in add"
)
_QUERY = re.compile(r"(?<![a-zA-Z])(q|query)(?![a-zA-Z])")
_SEEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that were seen to compute attention


def note_attention(module: nn.Module) -> None:
    """Remember that a module was seen to compute attention."""
    _SEEN.add(module)


def is_attention(module: nn.Module) -> bool:
    """Tell whether a module computes attention itself.

    By its projections, its class name, or an adapter; for a block that holds no module of attention also by the norms
    of its queries and keys (`q_norm`, a `QKNorm`), a fused projection (`img_attn_qkv`), or a call of an attention
    function in its `forward`.
    """
    if _is_named_attention(module):
        return True
    return _computes_attention(module) and not any(map(_is_named_attention, module.modules()))


def _is_named_attention(module: nn.Module) -> bool:
    names = {*module._modules, *module._parameters}
    if any(wanted <= names for wanted in _PROJECTIONS):
        return True
    if _SEEN and module in _SEEN:
        return True
    kind = type(module).__name__
    if "Attention" in kind and not any(word in kind for word in ("Block", "Layer", "Norm", "Transformer", "Pool")):
        return True
    return bool(stated("ATTENTION", module))


def _computes_attention(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.") or not any(map(_is_projection, module.children())):
        return False
    names = {*module._modules, *module._parameters}
    if any("qkv" in words_of(name) for name in names):
        return True
    # A child that projects as well is the attention itself.
    norms = [child._modules for child in module.children() if not any(map(_is_projection, child.children()))]
    if any(map(_has_pair, (names, *norms))):
        return True
    return calls_attention(module)


def _has_pair(names: Collection[str]) -> bool:
    return any(_of_key(name) in names for name in names)


@functools.lru_cache(maxsize=4096)
def _of_key(query: str) -> str | None:
    """Return what goes with `norm_q`, `q_norm`, `query_norm` and the like."""
    of_key = _QUERY.sub(lambda found: "key" if found[0] == "query" else "k", query, count=1)
    return of_key if of_key != query else None


def is_bare_attention(module: nn.Module) -> bool:
    """Tell attention from a block that computes it beside other things: most of its weights are projections of it."""
    if not is_attention(module):
        return False
    sizes = {True: 0, False: 0}
    for name, child in module._modules.items():
        if child is not None:
            is_of_attention = not _ATTENTION_WORDS.isdisjoint(words_of(name)) or is_attention(child)
            sizes[is_of_attention] += sum(parameter.numel() for parameter in child.parameters())
    return sizes[True] >= sizes[False]


def _is_projection(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.ndim > 1 for parameter in module._parameters.values())


def attention_modules(module: nn.Module) -> tuple[str, ...]:
    """Name the outermost attention modules inside a module, itself excluded."""
    found: list[str] = []
    for name, child in module.named_modules():
        if name and is_attention(child) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return tuple(found)
