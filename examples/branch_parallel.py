"""Branch parallelism: torchrun --nproc-per-node 3 examples/branch_parallel.py (with fewer processes, or alone, too)."""

import itertools
import os

import torch
import torch.distributed as dist

import stg_hooks as stg
from stg_hooks import demo


def main() -> torch.Tensor:
    """Guide the demo's model with one process for each of cond, weak and uncond; return the latents of one clip."""
    parallel = "WORLD_SIZE" in os.environ  # set by torchrun
    if parallel:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model = demo.load().transformer.to(device)  # every process holds the model
    cond = {"encoder_hidden_states": demo.embed(demo.labels(["red 3 blue 7"])).to(device)}
    uncond = {"encoder_hidden_states": demo.embed(None).to(device)}

    group = dist.group.WORLD if parallel else None
    guider = stg.Guider(model, layers=[6], scale=0.5, guidance_scale=2.0, group=group)
    x = torch.randn(1, 48, 6, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)  # the same seed everywhere
    times = torch.linspace(1, 0, 9).tolist()
    with torch.no_grad():
        for now, then in itertools.pairwise(times):
            t = torch.full((1,), 1000 * now, device=device)
            velocity = guider(hidden_states=x, timestep=t, cond=cond, uncond=uncond).sample
            x = x + (then - now) * velocity
    return x


if __name__ == "__main__":
    latents = main()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(demo.to_video(latents.cpu()).shape)
    if dist.is_initialized():
        dist.destroy_process_group()
