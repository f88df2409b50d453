"""A host that calls the model itself, with rows in an order of its own: what a node or a server is built like."""

import itertools

import torch
from torch import Tensor, nn

import stg_hooks as stg
from stg_hooks import demo

GUIDANCE_SCALE, SCALE = 2.0, 0.5


class Denoiser:
    """Predicts the velocity from one call on rows [cond, uncond], and a weak prediction of the cond rows."""

    def __init__(self, model: nn.Module, layers: list[int]) -> None:
        self.model = model
        self.predictor = stg.Predictor(model, [stg.Branch(layers)])  # touches nothing

    def __call__(self, x: Tensor, level: float, cond: Tensor, uncond: Tensor) -> Tensor:
        """Predict at one noise level, with skip guidance."""
        rows = len(x)
        call = {
            "hidden_states": torch.cat([x, x]),
            "timestep": torch.full((2 * rows,), 1000 * level),
            "encoder_hidden_states": torch.cat([cond, uncond]),
        }
        output, weaks = self.predictor(self.model, (), call, rows=slice(rows))
        with_prompt, without = output.sample.chunk(2)
        return stg.combine(with_prompt, weaks[0][0], without, scale=SCALE, guidance_scale=GUIDANCE_SCALE)


def main() -> Tensor:
    """Sample one clip of the demo's model; return its latents."""
    denoiser = Denoiser(demo.load().transformer, layers=[2])
    cond, uncond = demo.embed(demo.labels(["red 3 blue 7"])), demo.embed(None)
    torch.manual_seed(0)
    x = torch.randn(1, 48, 6, 4, 4)
    with torch.no_grad(), denoiser.predictor.installed():  # for a whole run; the model is as it was afterwards
        for level, lower in itertools.pairwise(torch.linspace(1, 0, 9).tolist()):
            x = x + (lower - level) * denoiser(x, level, cond, uncond)
    return x


if __name__ == "__main__":
    print(main().shape)
