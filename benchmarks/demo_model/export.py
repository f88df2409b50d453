"""Ship a checkpoint: the averaged weights in float16 and the configuration go into the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.demo_model.train_generator import CONFIG
from stg_hooks.demo import clips

WEIGHTS = Path(clips.__file__).parent / "weights"


def main() -> None:
    """Write transformer.safetensors, with the token table in it, and config.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--shift", type=float, default=5.0, help="timestep shift of the scheduler")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    state = torch.load(options.checkpoint, weights_only=True, mmap=True)
    weights = {name.removeprefix("transformer."): value.half().contiguous() for name, value in state["ema"].items()}
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.out / "transformer.safetensors")
    (options.out / "transformer.safetensors").chmod(0o644)  # safetensors makes files that only their owner can read
    config = {"transformer": CONFIG, "scheduler": {"shift": options.shift}}
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"step {state['step']}, {sum(value.numel() for value in weights.values()):,} weights")


if __name__ == "__main__":
    main()
