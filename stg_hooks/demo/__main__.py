"""Sample the same clips with and without skip guidance and write a page that shows them: `python -m stg_hooks.demo`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stg_hooks.errors import StgError
from stg_hooks.study.results import write_whole

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the clips are sampled. These defaults hold where no evaluation ships with the package."""

    layers: tuple[int, ...] = (5, 6, 7)
    mode: str = "residual"
    scale: float = 1.0
    guidance_scale: float = 1.0
    steps: int = 6

    @property
    def ways(self) -> tuple[str, str]:
        """Name the two ways of sampling."""
        if self.guidance_scale == 1:
            return "no guidance", "STG"
        return f"CFG {self.guidance_scale:g}", f"CFG {self.guidance_scale:g} + STG"


@dataclasses.dataclass(frozen=True)
class Clip:
    """One condition and seed, sampled both ways."""

    prompt: str
    seed: int
    plain: Tensor  # (F, H, W, 3), uint8
    guided: Tensor
    plain_seen: Tensor  # what the judge reads: the red and the blue digit of every frame, (F, 2)
    guided_seen: Tensor


def evaluation() -> dict[str, Any] | None:
    """Read the full evaluation that ships with the package, written by benchmarks/demo_model/sweep.py --final."""
    file = resources.files("stg_hooks.demo") / "weights" / "evaluation.json"
    try:
        report: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    return report


def default_settings(report: dict[str, Any] | None) -> Settings:
    """Use what the evaluation chose, if there is one."""
    if report is None:
        return Settings()
    chosen = dict(report["settings"])
    return Settings(**chosen | {"layers": tuple(chosen["layers"])})


def conditions(count: int) -> list[str]:
    """List conditions, every one of the 100 once before any comes twice, neighbours unlike each other.

    Args:
        count: how many.

    Returns:
        Prompts such as "red 3 blue 7".
    """
    return [f"red {(3 * i + 3) % 10} blue {(7 * i + 7 + i // 10) % 10}" for i in range(count)]


def sample(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, tick: Callable[[int], object]
) -> Tensor:
    """Generate one clip per prompt with a stock pipeline.

    Args:
        pipe: the demo's pipeline.
        prompts: a red and a blue digit each.
        seeds: seeds of the initial noise, one per prompt.
        settings: steps and guidance scale.
        tick: called after every step with the number of clips that have moved on.

    Returns:
        Latents, (B, 48, 6, 4, 4).
    """
    import torch

    from stg_hooks import demo

    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = list(seeds[start : start + BATCH])

        def step(*_: object, count: int = len(batch)) -> dict[str, Any]:
            tick(count)
            return {}

        call = demo.inputs(prompts[start : start + BATCH]) | {"num_inference_steps": settings.steps}
        generators = [torch.Generator().manual_seed(seed) for seed in batch]
        result = pipe(**call, guidance_scale=settings.guidance_scale, generator=generators, callback_on_step_end=step)
        parts.append(result.frames)
    return torch.cat(parts)


def run(settings: Settings, count: int, seed: int) -> list[Clip]:
    """Sample every condition both ways and let the judge look.

    Args:
        settings: how to sample.
        count: number of clips.
        seed: clip i starts from the noise of seed + i.

    Returns:
        The clips with what the judge sees in them.
    """
    from tqdm import tqdm

    import stg_hooks as stg
    from stg_hooks import demo
    from stg_hooks.demo import judge

    pipe, grader = demo.load(), judge.load()
    prompts, seeds = conditions(count), [seed + index for index in range(count)]
    guidance = stg.apply(pipe, layers=list(settings.layers), scale=settings.scale, mode=settings.mode)
    outputs: list[tuple[Tensor, Tensor]] = []
    ways: list[tuple[str, AbstractContextManager[Any]]] = list(
        zip(settings.ways, (nullcontext(), guidance), strict=True)
    )
    with tqdm(total=len(ways) * count * settings.steps, unit="step", smoothing=0.1, dynamic_ncols=True) as bar:
        for name, context in ways:
            bar.set_description(name)
            with context:
                latents = sample(pipe, prompts, seeds, settings, bar.update)
            outputs.append((demo.to_video(latents), judge.look(demo.to_clips(latents), grader)[0]))
    (plain, plain_seen), (guided, guided_seen) = outputs
    return [Clip(*fields) for fields in zip(prompts, seeds, plain, guided, plain_seen, guided_seen, strict=True)]


@contextmanager
def single_threaded() -> Iterator[None]:
    """Use one core: the model is too small for two, which wait for each other, for minutes if something else runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Parser(argparse.ArgumentParser):
    """Report what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message alone."""
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """Make an argument type that checks its range."""

    def parse(text: str) -> float:
        what = "a whole number" if kind is int else "a number"
        try:
            value: float = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")
        return value

    return parse


def arguments(argv: Sequence[str] | None, defaults: Settings) -> tuple[Settings, argparse.Namespace]:
    """Read and check the command line."""
    parser = Parser(prog="stg_hooks.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the page (default: %(default)s)")
    parser.add_argument("--clips", type=number(int, 1, 480), default=48, help="clips per way (default: 48)")
    parser.add_argument("--seed", type=number(int, 0, 10**9), default=0, help="clip i uses seed + i (default: 0)")
    parser.add_argument("--steps", type=number(int, 1, 200), default=defaults.steps, help="(default: %(default)s)")
    parser.add_argument(
        "--guidance-scale",
        type=number(float, 1, 20),
        default=defaults.guidance_scale,
        help="weight of CFG on both sides; 1 is off (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=list(defaults.layers),
        metavar="LAYER",
        help=f"layers that STG skips (default: {' '.join(map(str, defaults.layers))})",
    )
    parser.add_argument(
        "--scale", type=number(float, -10, 10), default=defaults.scale, help="weight of STG (default: %(default)s)"
    )
    parser.add_argument(
        "--mode", default=defaults.mode, help="what a skipped layer does instead (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file; name a folder")
    settings = Settings(tuple(options.layers), options.mode, options.scale, options.guidance_scale, options.steps)
    return settings, options


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: command line without the program's name; by default the real one.

    Returns:
        Exit status.
    """
    started = time.perf_counter()
    try:
        report = evaluation()
        settings, options = arguments(argv, default_settings(report))
        from stg_hooks.demo import page

        with single_threaded():
            clips = run(settings, options.clips, options.seed)
        for name, data in page.animations(clips, settings).items():
            write_whole(options.out / name, data)
        index: Path = options.out / "index.html"
        write_whole(index, page.render(clips, settings, report).encode())
    except (StgError, ImportError, OSError) as error:
        print(f"stg_hooks.demo: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(page.summary(clips, settings, report))}")
    print("\n" + " ".join([*page.headline(report), page.verdict(report, settings)]).rstrip())
    print(f"\nOpen {index.resolve()} in a browser ({time.perf_counter() - started:.0f} s).")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
