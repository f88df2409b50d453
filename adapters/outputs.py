"""What the predictions are of, in models that make several in a call. By class name; base classes count."""

_VIDEO_AND_AUDIO = ("video", "audio")

OUTPUTS: dict[str, tuple[str, ...]] = {
    "LTX2VideoTransformer3DModel": _VIDEO_AND_AUDIO,
    "LTXModel": _VIDEO_AND_AUDIO,  # Lightricks/LTX-2
    "X0Model": _VIDEO_AND_AUDIO,  # Lightricks/LTX-2: around it, with clean samples as predictions
    "LTXAVModel": _VIDEO_AND_AUDIO,  # ComfyUI
    "Kandinsky6Transformer3DModel": _VIDEO_AND_AUDIO,
    "MiniMaxH3Transformer3DModel": _VIDEO_AND_AUDIO,
    "Cosmos3OmniTransformer": ("vision", "sound", "action"),
}
"""Class name of a model to the names of what it returns, in their order.

Settings may be given by these names, as `scale={"video": 1.0, "audio": 0.5}`. A model that returns a dictionary, or an
object with one attribute for each, needs no entry.
"""
