"""Attention functions that torch cannot look into, and how they take their tensors."""

from stg_hooks.modes.layouts import Layout

_FLASH = Layout("b s h d", scale="softmax_scale")
_FLASH_PACKED = Layout("(b s) h d", ends="cu_seqlens_k", scale="softmax_scale")
_IN_QKV = ("qkv", 0), ("qkv", 1), ("qkv", 2)
_IN_Q_AND_KV = 0, ("kv", 0), ("kv", 1)

ATTENTION_FUNCTIONS: dict[str, Layout] = {
    "flash_attn.flash_attn_interface.flash_attn_func": _FLASH,
    "flash_attn.flash_attn_interface.flash_attn_varlen_func": _FLASH_PACKED,
    "flash_attn.flash_attn_interface.flash_attn_qkvpacked_func": Layout("b s h d", *_IN_QKV, scale="softmax_scale"),
    "flash_attn.flash_attn_interface.flash_attn_kvpacked_func": Layout("b s h d", *_IN_Q_AND_KV, scale="softmax_scale"),
    "flash_attn.flash_attn_interface.flash_attn_varlen_qkvpacked_func": Layout(
        "(b s) h d", *_IN_QKV, ends="cu_seqlens", scale="softmax_scale"
    ),
    "flash_attn.flash_attn_interface.flash_attn_varlen_kvpacked_func": Layout(
        "(b s) h d", *_IN_Q_AND_KV, ends="cu_seqlens_k", scale="softmax_scale"
    ),
    "flash_attn_interface.flash_attn_func": _FLASH,
    "flash_attn_interface.flash_attn_varlen_func": _FLASH_PACKED,
    "flash_attn.cute.flash_attn_func": _FLASH,
    "xformers.ops.memory_efficient_attention": Layout("b s h d", mask="attn_bias", scale="scale"),
    "sageattention.sageattn": Layout({"HND": "b h s d", "NHD": "b s h d"}, by="tensor_layout", scale="sm_scale"),
    "sageattention.sageattn_varlen": Layout("(b s) h d", ends="cu_seqlens_k", scale="sm_scale"),
    "torch.nn.attention.flex_attention.flex_attention": Layout("b h s d", scale="scale"),
    "comfy.ldm.modules.attention.optimized_attention": Layout(
        {False: "b s (h d)", True: "b h s d"},
        by="skip_reshape",
        output={False: "b s (h d)", True: "b h s d"},
        output_by="skip_output_reshape",
        heads="heads",
        mask="mask",
    ),
    "comfy.ldm.modules.attention.optimized_attention_masked": Layout(
        {False: "b s (h d)", True: "b h s d"},
        by="skip_reshape",
        output={False: "b s (h d)", True: "b h s d"},
        output_by="skip_output_reshape",
        heads="heads",
        mask="mask",
    ),
    "wan.modules.attention.flash_attention": Layout("b s h d", lengths="k_lens", scale="softmax_scale"),
}
"""Dotted name of a function (its module and its name in it) to how it takes its tensors.

For attention that no torch function shows: `ATTENTION_FUNCTIONS["my_model.attention.kernel"] = Layout("b s h d")`.
While a perturbed layer runs, the function is replaced in every module that calls it by this name or another.
"""
