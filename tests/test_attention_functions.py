"""Attention in functions that torch cannot look into: named by one line, replaced in single calls, and put back."""

from __future__ import annotations

import copy
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stg_hooks as stg
from stg_hooks import adapters
from stg_hooks.adapters import ATTENTION_FUNCTIONS, Layout
from tests import opaque, originals, zoo

KERNEL = "tests.originals.kernel"
MODES = ["values", "attention", "smoothed"]


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adapters, "ATTENTION_FUNCTIONS", dict(ATTENTION_FUNCTIONS))
    with torch.no_grad():
        yield
    assert originals.kernel is PLAIN


PLAIN = originals.kernel


def weak(model: nn.Module, layer: Any, mode: str) -> Tensor:
    with stg.skip(model, [layer], mode):
        return model(**zoo.inputs())


def by_hand(mode: str, text: slice | None) -> opaque.Change:
    """Return what a perturbed kernel computes, by the formula with the whole map."""

    def change(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        total = q.shape[-2]
        is_text = torch.zeros(total, dtype=torch.bool)
        if text is not None:
            is_text[text] = True
        if mode == "values":
            return v
        if mode == "smoothed":
            mean = q[..., ~is_text, :].mean(-2, keepdim=True)
            return opaque.plain(torch.where(is_text[:, None], q, mean), k, v, mask)
        seen = is_text | is_text[:, None]
        itself = torch.eye(total, dtype=torch.bool) & ~is_text  # also where padding hides it
        return opaque.plain(q, k, v, itself | (seen if mask is None else seen & mask))

    return change


def expected(model: nn.Module, block: str, change: opaque.Change) -> Tensor:
    """Run a deep copy in one block of which the kernel computes something else."""
    changed = copy.deepcopy(model)
    module = changed.get_submodule(block)
    forward = module.forward

    def around(*args: Any, **kwargs: Any) -> Any:
        opaque.KERNEL.change = change
        try:
            return forward(*args, **kwargs)
        finally:
            opaque.KERNEL.change = opaque.plain

    module.forward = around
    return changed(**zoo.inputs())


# --- joint attention in a kernel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", ["double_blocks.1", "single_blocks.0"])
def test_a_named_function_is_perturbed(block: str, mode: str) -> None:
    model = originals.build("kernels")
    adapters.ATTENTION_FUNCTIONS[KERNEL] = Layout("b s h d")
    videos = zoo.inputs()["x"].shape[1]
    change = by_hand(mode, slice(videos, None))
    actual = weak(model, block, mode)
    torch.testing.assert_close(actual, expected(model, block, change), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(actual, model(**zoo.inputs()))


def test_without_the_line_it_is_refused_and_the_line_that_is_printed_works() -> None:
    model = originals.build("kernels")
    with pytest.raises(stg.BlockError) as error:
        weak(model, "single_blocks.0", "values")
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert lines[1].startswith('ATTENTION_FUNCTIONS["tests.')
    exec("\n".join(lines), {})
    for mode in MODES:
        change = by_hand(mode, slice(zoo.inputs()["x"].shape[1], None))
        exact = expected(model, "single_blocks.0", change)
        torch.testing.assert_close(weak(model, "single_blocks.0", mode), exact, rtol=1e-5, atol=1e-6)


# --- where it is replaced, and when it is not -------------------------------------------------------------------------


def test_it_is_replaced_in_the_perturbed_layer_only() -> None:
    model = originals.build("kernels")
    adapters.ATTENTION_FUNCTIONS[KERNEL] = Layout("b s h d")
    held: dict[str, bool] = {}
    for name, block in [("first", model.double_blocks[0]), ("inside", model.single_blocks[0])]:
        target = block.norm if name == "inside" else block.img_mlp
        target.register_forward_hook(lambda *_, name=name: held.update({name: originals.kernel is PLAIN}))
    with stg.skip(model, "single_blocks.0", "values"):
        assert originals.kernel is PLAIN
        model(**zoo.inputs())
        assert originals.kernel is PLAIN
    assert held == {"first": True, "inside": False}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_is_put_back_after_an_error_or_an_interrupt(error: type[BaseException]) -> None:
    model = originals.build("kernels")
    adapters.ATTENTION_FUNCTIONS[KERNEL] = Layout("b s h d")

    def fail(*_: Any) -> None:
        raise error

    model.single_blocks[0].norm.register_forward_hook(fail)
    with pytest.raises(error), stg.skip(model, "single_blocks.0", "values"):
        model(**zoo.inputs())
    assert originals.kernel is PLAIN


def test_other_threads_compute_the_function_itself() -> None:
    model, other = originals.build("kernels"), originals.build("kernels")
    adapters.ATTENTION_FUNCTIONS[KERNEL] = Layout("b s h d")
    plain, found = other(**zoo.inputs()), []

    def elsewhere(*_: Any) -> None:
        def call() -> None:
            with torch.no_grad():
                found.append(other(**zoo.inputs()))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    model.single_blocks[0].norm.register_forward_hook(elsewhere)
    weak(model, "single_blocks.0", "values")
    torch.testing.assert_close(found[0], plain, rtol=0, atol=0)


def test_two_threads_at_once_and_two_layers_at_once() -> None:
    adapters.ATTENTION_FUNCTIONS[KERNEL] = Layout("b s h d")
    model, other = originals.build("kernels"), originals.build("kernels")
    alone, found = weak(other, "double_blocks.0", "values"), []

    def elsewhere(*_: Any) -> None:
        def call() -> None:
            with torch.no_grad():
                found.append(weak(other, "double_blocks.0", "values"))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with stg.skip(model, "single_blocks.1", "values"), stg.skip(model, "single_blocks.0", "values"):
        both = model(**zoo.inputs())
        handle = model.single_blocks[0].norm.register_forward_hook(elsewhere)
        again = model(**zoo.inputs())
        handle.remove()
    with stg.skip(model, ["single_blocks.0", "single_blocks.1"], "values"):
        torch.testing.assert_close(both, model(**zoo.inputs()), rtol=0, atol=0)
    torch.testing.assert_close(again, both, rtol=0, atol=0)
    torch.testing.assert_close(found[0], alone, rtol=0, atol=0)


# --- the layouts of well-known kernels --------------------------------------------------------------------------------


def of_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1))


def lens(x: Tensor) -> Tensor:
    return torch.tensor([x.shape[1], x.shape[1] - 2])


def flash_attn_func(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False
) -> Any:
    return opaque.attend(q, k, v)


def newer_flash_attn_func(q: Any, k: Any, v: Any, softmax_scale: Any = None) -> Any:
    return opaque.attend(q, k, v), None


def memory_efficient_attention(query: Any, key: Any, value: Any, attn_bias: Any = None, p: float = 0.0) -> Any:
    return opaque.attend(query, key, value)


def sageattn(q: Any, k: Any, v: Any, tensor_layout: str = "HND", is_causal: bool = False) -> Any:
    if tensor_layout == "NHD":
        return opaque.attend(q, k, v)
    return opaque.attend(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


def optimized_attention(
    q: Any, k: Any, v: Any, heads: int, mask: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False
) -> Any:
    parts = [x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
    output = opaque.attend(*parts)
    return output.transpose(1, 2) if skip_output_reshape else output.flatten(2)


def flash_attention(q: Any, k: Any, v: Any, q_lens: Any = None, k_lens: Any = None, window_size: Any = (-1, -1)) -> Any:
    return opaque.attend(q, k, v, k_lens=k_lens).to(q.dtype)


Call = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def packed(function: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two sequences for each row, as HunyuanVideo's, the second of which is padding."""
    b, s = q.shape[:2]
    ends = torch.tensor([0, *(end for i in range(b) for end in (i * s + s - 1, i * s + s))], dtype=torch.int32)
    parts = (x.reshape(b * s, *x.shape[2:]) for x in map(of_heads, (q, k, v)))
    return function(*parts, ends, ends, s, s).view(b, s, -1)


def heads_first(function: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return function(*(of_heads(x).transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2).flatten(2)


def reshaped(function: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return function(*(of_heads(x).transpose(1, 2) for x in (q, k, v)), heads=2, skip_reshape=True)


def tokens_first(function: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    output = function(*map(of_heads, (q, k, v)), **options)
    return (output[0] if isinstance(output, tuple) else output).flatten(2)


KERNELS: dict[str, tuple[str, Any, Call]] = {
    "flash-attention": ("flash_attn.flash_attn_interface.flash_attn_func", flash_attn_func, tokens_first),
    "flash-attention 3": ("flash_attn_interface.flash_attn_func", newer_flash_attn_func, tokens_first),
    "packed": ("flash_attn.flash_attn_interface.flash_attn_varlen_func", opaque.attend_varlen, packed),
    "xformers": ("xformers.ops.memory_efficient_attention", memory_efficient_attention, tokens_first),
    "sage": ("sageattention.sageattn", sageattn, heads_first),
    "sage, tokens first": (
        "sageattention.sageattn",
        sageattn,
        lambda f, q, k, v: tokens_first(f, q, k, v, tensor_layout="NHD"),
    ),
    "ComfyUI": (
        "comfy.ldm.modules.attention.optimized_attention",
        optimized_attention,
        lambda f, q, k, v: f(q, k, v, heads=2),
    ),
    "ComfyUI, heads first": ("comfy.ldm.modules.attention.optimized_attention", optimized_attention, reshaped),
    "Wan": (
        "wan.modules.attention.flash_attention",
        flash_attention,
        lambda f, q, k, v: tokens_first(f, q, k, v, k_lens=lens(k)),
    ),
}


class KernelJoint(nn.Module):
    """Joint attention in a kernel, between text and video of one block."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(zoo.DIM, zoo.DIM) for _ in range(3))
        self.name = name

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((encoder_hidden_states, hidden_states), dim=1)
        path, _, call = KERNELS[self.name]
        module, _, function = path.rpartition(".")
        output = call(getattr(sys.modules[module], function), self.to_q(both), self.to_k(both), self.to_v(both))
        length = encoder_hidden_states.shape[1]
        return output[:, length:], output[:, :length]


class KernelBlock(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.attn, self.ff = KernelJoint(name), nn.Linear(zoo.DIM, zoo.DIM)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        video, text = self.attn(hidden_states, encoder_hidden_states)
        hidden_states, encoder_hidden_states = hidden_states + video, encoder_hidden_states + text
        return hidden_states + F.gelu(self.ff(hidden_states)), encoder_hidden_states


class KernelModel(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(KernelBlock(name) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x, text = block(x, text)
        return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KERNELS)
def test_well_known_kernels(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, function, _ = KERNELS[name]
    parts = path.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    monkeypatch.setattr(sys.modules[path.rpartition(".")[0]], parts[-1], function, raising=False)
    torch.manual_seed(0)
    model = KernelModel(name).eval()
    length = zoo.inputs()["text"].shape[1]
    change = by_hand(mode, slice(0, length))
    if name == "packed":  # which sees one sequence at a time, the first of a row without its last token

        def change(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            is_rest = q.shape[-2] == 1
            return by_hand(mode, None if is_rest else slice(0, length))(q, k, v, mask)

    actual = weak(model, 1, mode)
    torch.testing.assert_close(actual, expected(model, "blocks.1", change), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(actual, model(**zoo.inputs()))


def test_flex_attention_of_torch() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    path = "torch.nn.attention.flex_attention.flex_attention"
    assert path in ATTENTION_FUNCTIONS
    KERNELS["flex"] = (path, flex_attention, heads_first)
    torch.manual_seed(0)
    model, same = KernelModel("flex").eval(), KernelModel("sdpa").eval()
    KERNELS["sdpa"] = ("torch.nn.functional.scaled_dot_product_attention", None, heads_first)
    same.load_state_dict(model.state_dict())
    for mode in MODES:
        torch.testing.assert_close(weak(model, 1, mode), weak(same, 1, mode), rtol=1e-5, atol=1e-6)


# --- cross-attention in a kernel --------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Cross-attention as Open-Sora 1.2's, in a kernel that torch cannot look into."""

    def __init__(self) -> None:
        super().__init__()
        self.q_linear, self.kv_linear = nn.Linear(zoo.DIM, zoo.DIM), nn.Linear(zoo.DIM, 2 * zoo.DIM)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        k, v = self.kv_linear(cond).chunk(2, dim=-1)
        return opaque.attend(*map(of_heads, (self.q_linear(x), k, v))).flatten(2)


class RowsMerged(CrossAttention):
    """Cross-attention as PixArt-alpha's: rows lie one after the other, and a mask keeps them apart."""

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        k, v = self.kv_linear(cond).view(1, -1, 2 * zoo.DIM).chunk(2, dim=-1)
        q = self.q_linear(x).view(1, -1, zoo.DIM)
        parts = zip(q.chunk(len(x), 1), k.chunk(len(x), 1), v.chunk(len(x), 1), strict=True)
        whole = merged_kernel(of_heads(q), of_heads(k), of_heads(v), parts)
        return whole.flatten(2).view(x.shape)


def merged_kernel(q: Tensor, k: Tensor, v: Tensor, parts: Any) -> Tensor:
    return torch.cat([opaque.attend(*map(of_heads, part)) for part in parts], 1)


class BesideKernel(zoo.Block):
    def __init__(self) -> None:
        super().__init__()
        self.cross = CrossAttention()


class BesideMergedRows(zoo.Block):
    def __init__(self) -> None:
        super().__init__()
        self.cross = RowsMerged()


def test_cross_attention_whose_rows_are_merged_is_no_obstacle() -> None:
    adapters.ATTENTION_FUNCTIONS["tests.test_attention_functions.merged_kernel"] = Layout("b s h d")
    torch.manual_seed(0)
    model = zoo.DiT(BesideMergedRows).eval()
    torch.testing.assert_close(weak(model, 1, "values"), weak(model, "blocks.1.attn", "values"), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_cross_attention_in_a_kernel_beside_visible_self_attention(mode: str) -> None:
    torch.manual_seed(0)
    model = zoo.DiT(BesideKernel).eval()
    actual = weak(model, 1, mode)
    named = copy.deepcopy(model)
    exact = weak(named, "blocks.1.attn", mode)
    torch.testing.assert_close(actual, exact, rtol=0, atol=0)
    assert not torch.equal(actual, model(**zoo.inputs()))


def test_nothing_but_attention_in_a_kernel_is_refused() -> None:
    model = zoo.DiT(BesideKernel).eval()
    with pytest.raises(stg.BlockError, match="neither with torch's"):
        weak(model, "blocks.1.cross", "values")


def test_what_a_layout_does_not_state_is_refused_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ("wan", "wan.modules", "wan.modules.attention")
    for name in parts:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[parts[-1]].flash_attention = flash_attention
    KERNELS["windowed"] = (
        KERNELS["Wan"][0],
        flash_attention,
        lambda f, q, k, v: tokens_first(f, q, k, v, window_size=(3, 3)),
    )
    model = KernelModel("windowed").eval()
    weak(model, 1, "values")
    with pytest.raises(stg.BlockError, match="window_size"):
        weak(model, 1, "smoothed")
