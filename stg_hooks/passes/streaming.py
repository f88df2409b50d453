"""Whether a model's weights lie on its device, or are brought there in each pass."""

from __future__ import annotations

from torch import nn


def weights_are_streamed(model: nn.Module) -> bool:
    """Tell whether a model's weights are brought to the device piece by piece in each pass: the rule of `"auto"`.

    With L blocks and k the first skipped one, a sequential step brings `(2 * L - k - 1) / L` times the weights that a
    batched one brings (1.27 for Mochi), for the same arithmetic. Where weights stay, batched only saves launches, and
    costs memory and copies. `python -m benchmarks.cost`, with and without `--offload`, measures both.

    Args:
        model: the denoiser, as it is when guidance is set up.

    Returns:
        Whether accelerate (CPU or disk offload), diffusers (group offload) or FSDP2 (`fully_shard`, which gathers
        weights from other devices) has left its mark on a submodule.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook])):
            return True
        if "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            return True
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            return True
    return False
