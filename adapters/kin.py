"""Classes of other code bases for models that diffusers has as well: ComfyUI's, and those of the original repositories.

By class name; the nearest base class counts. `where` says in which attribute of such a module a value of diffusers'
configuration is found: of a list of blocks its length counts, of another module its class.
"""

from stg_hooks.guidance.published import Kin

_LTX = {"num_layers": "transformer_blocks"}
_LTX_2 = {"num_layers": "transformer_blocks", "cross_attn_mod": "cross_attention_adaln"}
_HUNYUAN = {"num_layers": "double_blocks", "num_single_layers": "single_blocks"}
_MMDIT = {"num_layers": "joint_blocks", "qk_norm": "joint_blocks.0.x_block.attn.ln_q"}
_NORMS = {"RMSNorm": "rms_norm"}

KIN: dict[str, Kin] = {
    "LTXVModel": Kin("LTXVideoTransformer3DModel", _LTX),  # ComfyUI
    "Transformer3DModel": Kin("LTXVideoTransformer3DModel", _LTX, has=("patchify_proj",)),  # Lightricks/LTX-Video
    "LTXAVModel": Kin("LTX2VideoTransformer3DModel", _LTX_2),  # ComfyUI
    "LTXModel": Kin("LTX2VideoTransformer3DModel", _LTX_2, has=("audio_patchify_proj",)),  # Lightricks/LTX-2
    "AsymmDiTJoint": Kin("MochiTransformer3DModel", {"num_layers": "blocks"}),  # genmoai/mochi, ComfyUI
    # HunyuanImage, of the same class and depth in ComfyUI, has no pooled text.
    "HunyuanVideo": Kin("HunyuanVideoTransformer3DModel", _HUNYUAN, has=("vector_in",)),  # ComfyUI
    "HYVideoDiffusionTransformer": Kin("HunyuanVideoTransformer3DModel", _HUNYUAN),  # Tencent-Hunyuan/HunyuanVideo
    "WanModel": Kin(  # Wan-Video/Wan2.1, ComfyUI
        "WanTransformer3DModel", {"num_layers": "blocks", "num_attention_heads": "num_heads"}
    ),
    "MMDiTX": Kin("SD3Transformer2DModel", _MMDIT, names=_NORMS),  # Stability-AI/sd3.5
    "MMDiT": Kin("SD3Transformer2DModel", _MMDIT, names=_NORMS),  # ComfyUI
}
