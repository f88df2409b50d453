"""A hand-written loop over a diffusers scheduler."""

import torch

import stg_hooks as stg
from stg_hooks import demo


def main() -> torch.Tensor:
    """Sample one clip of the demo's model; return its latents."""
    pipe = demo.load()  # any transformer and scheduler will do
    model, scheduler = pipe.transformer, pipe.scheduler
    cond = {"encoder_hidden_states": demo.embed(demo.labels(["red 3 blue 7"]))}
    uncond = {"encoder_hidden_states": demo.embed(None)}

    guider = stg.Guider(model, layers=[6], scale=0.5, guidance_scale=2.0, stop=0.8)
    x = torch.randn(1, 48, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(demo.STEPS)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            guider.step = stg.Step(index=i, count=demo.STEPS)  # only because of stop=
            velocity = guider(hidden_states=x, timestep=t.expand(len(x)), cond=cond, uncond=uncond).sample
            x = scheduler.step(velocity, t, x).prev_sample
    return x


if __name__ == "__main__":
    print(demo.to_video(main()).shape)
