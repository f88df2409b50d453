"""Published settings for known models, with their sources; where a model has several, the recommended one first.

Layers count from 0 in the order in which the blocks run. `where` names the values of the model's configuration that
tell the published model from others of its class.
"""

import math

from stg_hooks.guidance.published import Published
from stg_hooks.guidance.settings import Branch

_REFERENCE = "STGuidance reference code, commit df04da0, and diffusers community pipelines; arXiv 2411.18664"
_REFERENCE_9CDD383 = "STGuidance reference code, commit 9cdd383; arXiv 2411.18664"
_LIGHTRICKS_2B = "Lightricks/LTX-Video, configs/ltxv-2b-0.9.6-dev.yaml (and 0.9, 0.9.1, 0.9.5), commit 5260738"
_LIGHTRICKS_13B = "Lightricks/LTX-Video, configs/ltxv-13b-0.9.8-dev.yaml, commit 5260738"
_LTX_2 = "Lightricks/LTX-2, ltx_pipelines/utils/constants.py, commit 400fd31; also built into diffusers' LTX2Pipeline"
_LTX_2_NOTE = (
    "Video and audio self-attention of the block; CFG 7 for audio. Left out: the source's modality guidance (scale 3), "
    "and its rescale of 0.7, which is about predictions of the clean sample and not about the model's velocities. "
    "LTX2Pipeline does both by itself (`modality_scale`, `guidance_rescale`); the second code has them here."
)

PUBLISHED: tuple[Published, ...] = (
    Published(
        name="Mochi 1",
        model="MochiTransformer3DModel",
        where={"num_layers": 48},
        layers=(34,),
        mode="residual",
        scale=1.0,
        guidance_scale=4.5,
        steps="64",
        source=_REFERENCE,
        note='The paper counts from one: "35th".',
    ),
    Published(
        name="LTX-Video 2B (0.9 to 0.9.6-dev)",
        model="LTXVideoTransformer3DModel",
        where={"num_layers": 28},
        layers=(19,),
        mode="residual",
        scale=1.0,
        guidance_scale=3.0,
        steps="40-50",
        source=_REFERENCE,
        note="Distilled checkpoints share this configuration; they are published with guidance off.",
    ),
    Published(
        name="LTX-Video 2B (0.9 to 0.9.6-dev), Lightricks",
        model="LTXVideoTransformer3DModel",
        where={"num_layers": 28},
        layers=(19,),
        mode="values",
        scale=1.0,
        rescale=0.7,
        guidance_scale=3.0,
        steps="40",
        source=_LIGHTRICKS_2B,
        note="Distilled checkpoints share this configuration; they are published with guidance off.",
    ),
    Published(
        name="LTX-Video 13B 0.9.8-dev",
        model="LTXVideoTransformer3DModel",
        where={"num_layers": 48},
        layers=(28,),
        mode="values",
        scale=1.0,
        steps="30",
        rule="zero_star",
        source=f"{_LIGHTRICKS_13B}, first pass",
        note="Changes with the noise level, CFG included: call the pipeline with any guidance_scale above 1. Left out: "
        "the source stops 3 steps before the end (skip_final_inference_steps) and hands over to its second pass. "
        "Distilled checkpoints share this configuration; they are published with guidance off.",
        schedule=(
            (1.0, {"layers": [], "guidance_scale": 1.0}),
            (0.996, {"layers": [11, 25, 35, 39], "scale": 0.0, "guidance_scale": 1.0}),
            (0.9933, {"layers": [22, 35, 39], "scale": 4.0, "guidance_scale": 6.0, "rescale": 0.5}),
            (0.9850, {"layers": [28], "scale": 4.0, "guidance_scale": 8.0, "rescale": 0.5}),
            (0.9767, {"layers": [28], "scale": 4.0, "guidance_scale": 6.0}),
            (0.9008, {"layers": [28], "scale": 2.0, "guidance_scale": 1.0}),
            (0.6180, {"layers": [28], "scale": 1.0, "guidance_scale": 1.0}),
        ),
    ),
    Published(
        name="LTX-Video 13B 0.9.8-dev, second pass",
        model="LTXVideoTransformer3DModel",
        where={"num_layers": 48},
        layers=(27,),
        mode="values",
        scale=1.0,
        guidance_scale=1.0,
        steps="30",
        source=f"{_LIGHTRICKS_13B}, second pass",
        note="For the enlarged latents of the first pass. Left out: the source leaves out the first 17 of the 30 steps "
        "(skip_initial_inference_steps). Its CFG-Zero* has no effect, as CFG is off.",
    ),
    Published(
        name="CogVideoX-2B",
        model="CogVideoXTransformer3DModel",
        where={"num_layers": 30},
        layers=(11,),
        mode="residual",
        scale=1.0,
        guidance_scale=6.0,
        steps="50",
        source=_REFERENCE,
    ),
    Published(
        name="CogVideoX-5B",
        model="CogVideoXTransformer3DModel",
        where={"num_layers": 42},
        layers=(30,),
        mode="attention",
        scale=4.0,
        rescale=0.7,
        guidance_scale=6.0,
        steps="50",
        source=_REFERENCE_9CDD383,
        note="The reference's attention mask was misaligned for this model (text comes first): take with care.",
    ),
    Published(
        name="HunyuanVideo",
        model="HunyuanVideoTransformer3DModel",
        where={"num_layers": 20, "num_single_layers": 40},
        layers=(2,),
        mode="residual",
        scale=1.0,
        guidance_scale=6.0,
        steps="30",
        source=_REFERENCE,
        note="Guidance-distilled: guidance_scale is an input of the model, and there is no CFG pass.",
    ),
    Published(
        name="Wan 2.1 1.3B",
        model="WanTransformer3DModel",
        where={"num_layers": 30, "num_attention_heads": 12},
        layers=(2,),
        mode="residual",
        scale=2.0,
        guidance_scale=5.0,
        steps="50",
        source="STGuidance reference script, commit df04da0: Wan2.1/inference_low_memory.py",
        note="Only the numbers are the script's: its weak prediction has the negative prompt, and its difference is "
        "taken from the prediction with CFG, so that its term is larger. Here the term is cond - weak, both with the "
        "prompt, as in the paper and in diffusers' community pipeline, whose default is layers [3, 8, 16] and scale 1.",
    ),
    Published(
        name="Wan 2.1 14B",
        model="WanTransformer3DModel",
        where={"num_layers": 40},
        layers=(8,),
        mode="residual",
        scale=1.0,
        guidance_scale=5.0,
        steps="50",
        source="diffusers community pipeline_stg_wan.py, example",
        note="Wan 2.2 A14B has two denoisers of this configuration; for it nothing of its own is published.",
    ),
    Published(
        name="Stable Video Diffusion",
        model="UNetSpatioTemporalConditionModel",
        where={"layers_per_block": 2, "transformer_layers_per_block": 1, "cross_attention_dim": 1024},
        layers=(7,),
        mode="attention",
        scale=2.0,
        rescale=0.7,
        guidance_scale=3.0,
        steps="25",
        source=_REFERENCE_9CDD383,
        kind="spatial",
        also=(Branch([7], 0.5, "attention", "temporal"),),
        note="Layer 7 is the first on the way up; the paper counts from one.",
    ),
    Published(
        name="LTX-2",
        model="LTX2VideoTransformer3DModel",
        where={"num_layers": 48, "cross_attn_mod": False},
        layers=(29,),
        mode="values",
        scale=1.0,
        guidance_scale=3.0,
        steps="40",
        source=_LTX_2,
        note=_LTX_2_NOTE,
    ),
    Published(
        name="LTX-2.3",
        model="LTX2VideoTransformer3DModel",
        where={"num_layers": 48, "cross_attn_mod": True},
        layers=(28,),
        mode="values",
        scale=1.0,
        guidance_scale=3.0,
        steps="30",
        source=_LTX_2,
        note=_LTX_2_NOTE,
    ),
    Published(
        name="Stable Diffusion 3.5 medium",
        model="SD3Transformer2DModel",
        where={"num_layers": 24, "qk_norm": "rms_norm"},
        layers=(7, 8, 9),
        mode="residual",
        scale=2.8,
        guidance_scale=4.5,
        source="diffusers' StableDiffusion3Pipeline, defaults of skip_guidance_layers",
        note="From 1 % to 20 % of the steps, without these two ends. Stability AI's own code (sd3.5, commit fbf8f48) "
        "has scale 2.5, CFG 4 and 50 steps. qk_norm tells it from Stable Diffusion 3 medium.",
        start=math.nextafter(0.01, 1),  # step i of n is guided where 0.01 n < i
        stop=0.2,
    ),
)
