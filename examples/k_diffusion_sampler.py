"""A sampler and a transformer of k-diffusion. Needs `pip install k-diffusion`."""

import k_diffusion as K
import torch
from torch import Tensor

import stg_hooks as stg


def main() -> Tensor:
    """Sample two images; return them."""
    torch.manual_seed(0)
    model = K.models.image_transformer_v1.ImageTransformerDenoiserModelV1(
        n_layers=4, d_model=64, d_ff=64, in_features=3, out_features=3, patch_size=(2, 2), num_classes=11
    )
    for parameter in model.parameters():  # load your checkpoint here; a fresh model predicts exactly 0
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    denoiser = K.layers.Denoiser(model.eval(), sigma_data=0.5)

    cond = {"class_cond": torch.tensor([3, 7])}
    uncond = {"class_cond": torch.tensor([10, 10])}
    sigmas = K.sampling.get_sigmas_karras(8, 0.02, 80.0)
    guider = stg.Guider(denoiser, ["blocks.2"], scale=1.0, guidance_scale=3.0, sigmas=sigmas, start=0.25)
    report = stg.k_diffusion.callback(guider, lambda info: print(info["i"], info["trace"] and info["trace"].size))
    return K.sampling.sample_dpmpp_2m(
        guider,
        sigmas[0] * torch.randn(2, 3, 16, 16),
        sigmas,
        extra_args={"cond": cond, "uncond": uncond},
        callback=report,
        disable=True,
    )


if __name__ == "__main__":
    print(main().shape)
