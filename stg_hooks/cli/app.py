"""The commands: what they are called with, and what they print."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

import stg_hooks as stg
from stg_hooks.cli.calls import (
    Typed,
    blamed_on,
    guidance_from,
    guidance_in,
    in_groups,
    named_as_typed,
    numbers_from,
    one_by_one,
    options_from,
    picture_from,
    prompt_for,
    settings_of,
    words_from,
)
from stg_hooks.cli.commands import Command, Commands
from stg_hooks.cli.failures import FailureError, note, reported
from stg_hooks.cli.files import check_folder, check_output, check_results, write_frames
from stg_hooks.cli.models import DEMO, Dtype, Offload, Source

app = typer.Typer(
    name="stg-hooks",
    cls=Commands,
    help="Skip guidance for video and image diffusion models.\n\nMODEL is a folder or a model of the hub that "
    "diffusers loads, or `demo` for the small model inside this package (write `./demo` for a folder of that name).\n\n"
    "Exit status: 0 done, 1 failed, 2 what was asked for cannot be done, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,  # twice as fast, and as easy to read
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub name, or `demo`.", show_default=False)]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the weights; auto: bfloat16 on an accelerator.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
OffloadOption = Annotated[
    Offload,
    typer.Option(
        "--offload",
        help="Keep weights in CPU memory: a model, a layer (least memory, slowest) or a group of layers at a time.",
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layers", help="Skipped together: numbers or names, `34` or `2+5`. Left out: as published."),
]
Scale = Annotated[float | None, typer.Option("--scale", help="Weight of skip guidance; 0 is off.  [default: 1]")]
Mode = Annotated[str | None, typer.Option("--mode", help="What a skipped layer does: residual, attention, values, ...")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")]
GuidanceScale = Annotated[float | None, typer.Option("--guidance-scale", help="Weight of CFG.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other argument of the pipeline: `--set true_cfg_scale=4`."),
]
ImageOption = Annotated[str | None, typer.Option("--image", help="For image-to-video: a file or URL.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="May be given several times.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.", show_default=False)]


def _seed(value: int) -> int:
    if value >= 2**64:  # not as the option's `max`, which the help would spell out
        raise typer.BadParameter("expected less than 2**64")
    return value


Seed = Annotated[int, typer.Option("--seed", min=0, callback=_seed, help="Of the noise that a run starts from.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"stg-hooks {stg.__version__}, torch {version('torch')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options that come before the command."""


def _options(
    prompt: list[str] | None, steps: int | None, guidance_scale: float | None, image: str | None, more: list[str] | None
) -> list[Typed]:
    """Read the arguments of the pipeline for which profile and sweep have options."""
    given = {"prompt": prompt, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    return options_from({**given, "image": picture_from(image)}, more)


@app.command(cls=Command)
def layers(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List what can be skipped, and what is published. Reads configurations only: no weights are fetched or loaded."""
    with reported():
        from stg_hooks.study.table import LayerTable

        table = LayerTable(Source(model).denoisers())
        if as_json:
            typer.echo(json.dumps(table.to_dict(), indent=1, default=str))
        else:
            typer.echo(str(table))


@app.command(cls=Command)
def generate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="A .mp4, .webp, .gif or .png file.", show_default=False)],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to show.")] = None,
    layers: Layers = None,
    scale: Scale = None,
    mode: Mode = None,
    rescale: Annotated[float | None, typer.Option("--rescale", help="0 to 1: hold contrast.  [default: 0]")] = None,
    start: Annotated[
        float | None, typer.Option("--start", help="Part of the run from which there is guidance.  [default: 0]")
    ] = None,
    stop: Annotated[
        float | None, typer.Option("--stop", help="Part of the run from which there is none.  [default: 1]")
    ] = None,
    saved: Annotated[
        Path | None,
        typer.Option("--settings", help="A JSON file of settings; options beside it count instead of its own."),
    ] = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", "-n")] = None,
    image: ImageOption = None,
    steps: Steps = None,
    width: Annotated[int | None, typer.Option("--width", min=1)] = None,
    height: Annotated[int | None, typer.Option("--height", min=1)] = None,
    frames: Annotated[int | None, typer.Option("--frames", min=1)] = None,
    seed: Seed = 0,
    fps: Annotated[float, typer.Option("--fps", min=0.1, help="Of the file that is written.")] = 8.0,
    setting: Setting = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    offload: OffloadOption = Offload.none,
) -> None:
    """Make one video or image with skip guidance; the file is written whole or not at all."""
    with reported():
        check_output(out, force)
        source = Source(model, dtype, device, offload)
        typed = guidance_from(layers, scale, mode, rescale, start, stop)
        read = guidance_in(saved)
        weight = read.pop("guidance_scale", None)  # which the pipeline has
        guidance = read | typed
        text = prompt_for(source, prompt, image)
        given = {
            "prompt": prompt,
            "guidance_scale": weight if guidance_scale is None else guidance_scale,
            "negative_prompt": negative_prompt,
            "num_inference_steps": steps,
            "width": width,
            "height": height,
            "num_frames": frames,
            "image": picture_from(image),
        }
        options = options_from(given, setting)
        settings = settings_of(options)
        with blamed_on(saved, read.keys() - typed.keys()):
            _check(source, guidance)
        from stg_hooks.study.sampling import generator_of, prompts_from, sampler_of

        with named_as_typed(options):
            source.check_arguments(settings)
            pipe = source.pipeline()
            make = sampler_of(pipe, None, settings, "np")
            prompts_from(text, pipe)
            with stg.apply(pipe, **guidance) as session:
                output = make(text, generator_of(seed))
        media = importlib.import_module("stg_hooks.study.media")
        write_frames(out, media.frames_of(output), fps)
        if model == DEMO and prompt is None:
            note(f'demo draws "{text}" where there is no --prompt')
        note(f"{out}: {session.stats.guided_calls} of {session.stats.calls} calls of the model guided")


@app.command(cls=Command)
def profile(
    model: Model,
    out: Out,
    layers: Annotated[list[str] | None, typer.Option("--layers", help="Each by itself: `2,5`. Left out: all.")] = None,
    modes: Annotated[str, typer.Option("--modes", help="What skipped layers do.")] = "residual",
    levels: Annotated[int, typer.Option("--levels", min=1, help="How many noise levels.")] = 5,
    prompt: Prompts = None,
    image: ImageOption = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    at_once: Annotated[
        int | None, typer.Option("--layers-at-once", min=1, help="Fewer: less memory, more time.  [default: all]")
    ] = None,
    setting: Setting = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    offload: OffloadOption = Offload.none,
) -> None:
    """Measure what skipping each layer would do, along an ordinary run and without sampling any setting."""
    with reported("layers", "modes"):
        check_folder(out)
        source = Source(model, dtype, device, offload)
        chosen, kinds = one_by_one(layers), words_from("--modes", modes)
        if chosen:
            _check_all(source, [[layer] for layer in chosen], kinds)
        options = _options(prompt, steps, guidance_scale, image, setting)
        settings = settings_of(options)
        with named_as_typed(options):
            source.check_arguments(settings)
            result = stg.profile(
                source.pipeline(), chosen, kinds, levels, prompts=prompt, seed=seed, layers_at_once=at_once, **settings
            )
        result.save(out)
        typer.echo(str(result))
        note(f"Look at it: stg-hooks report {out}")


@app.command(cls=Command)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where profile or sweep wrote.", show_default=False)],
    plots: Annotated[bool, typer.Option("--plots", help="PNG files beside the page, too.")] = False,
    megabytes: Annotated[float, typer.Option("--max-megabytes", min=0, help="Of samples on the page.")] = 64.0,
) -> None:
    """Show a profile or a sweep on a page that needs no network, with JSON and CSV beside it."""
    with reported():
        check_results(folder)
        typer.echo(str(stg.report(folder, plots=plots, max_megabytes=megabytes)))


@app.command(cls=Command)
def sweep(
    model: Model,
    out: Out,
    layers: Annotated[list[str] | None, typer.Option("--layers", help="One cell each: `2,5`; together: `2+5`.")] = None,
    scales: Annotated[str, typer.Option("--scales", help="Weights of skip guidance.")] = "0.5,1.0",
    modes: Annotated[str, typer.Option("--modes", help="What skipped layers do.")] = "residual",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many per prompt and cell.")] = 1,
    prompt: Prompts = None,
    image: ImageOption = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    setting: Setting = None,
    fps: Annotated[int, typer.Option("--fps", min=1, help="Of the videos that are written.")] = 8,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    offload: OffloadOption = Offload.none,
) -> None:
    """Sample a grid of layers, modes and scales with the same seeds. Run it again to go on; run it twice to share."""
    with reported("layers", "modes", "scales"):
        check_folder(out)
        source = Source(model, dtype, device, offload)
        prompts = prompt or [prompt_for(source, None, image)]
        columns = in_groups(layers)
        weights, kinds = numbers_from("--scales", scales), words_from("--modes", modes)
        _check_all(source, columns or [], kinds)
        options = _options(prompt, steps, guidance_scale, image, setting)
        settings = settings_of(options)
        grid: dict[str, Any] = {"layers": columns, "scales": weights, "modes": kinds, "seeds": seeds}
        with named_as_typed(options):
            source.check_arguments(settings)
            result = stg.sweep(source.pipeline(), prompts, out=out, **grid, fps=fps, **settings)
        typer.echo(str(result))
        note(f"Look at it: stg-hooks report {out}")
        if result.failed:
            raise FailureError(f"{len(result.failed)} of {len(result.cells)} cells failed; run it again to try them.")


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the page.")] = Path("demo"),
    clips: Annotated[int, typer.Option("--clips", min=1, max=480, help="Per way.")] = 48,
    seed: Annotated[int, typer.Option("--seed", min=0, max=10**9)] = 0,
) -> None:
    """Make clips of the embedded model with and without skip guidance, on a page; two minutes on a CPU."""
    with reported():
        check_folder(out)
        try:
            run = importlib.import_module("stg_hooks.demo.__main__").main
            status = run(["--out", str(out), "--clips", str(clips), "--seed", str(seed)])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        raise typer.Exit(status)


@app.command(cls=Command)
def bench(
    model: Model,
    layers: Layers = None,
    mode: Mode = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What to show.")] = None,
    image: ImageOption = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Of each run.")] = 6,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs of each way, in turns.")] = 3,
    setting: Setting = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    offload: OffloadOption = Offload.none,
) -> None:
    """Time a step of the pipeline without skip guidance, and with each way to compute it."""
    with reported():
        from rich.console import Console
        from rich.table import Table

        from stg_hooks.study.sampling import generator_of, prompts_from, sampler_of

        measure = importlib.import_module("stg_hooks.cli.bench").measure
        source = Source(model, dtype, device, offload)
        guidance, text = guidance_from(layers, None, mode), prompt_for(source, prompt, image)
        options = options_from({"prompt": prompt, "num_inference_steps": steps, "image": picture_from(image)}, setting)
        settings = settings_of(options) | {"output_type": "latent"}
        _check(source, guidance)
        with named_as_typed(options):
            source.check_arguments(settings)
            pipe = source.pipeline()
            pipe.set_progress_bar_config(disable=True)
            prompts_from(text, pipe)

            def run(ended: Any) -> None:
                make = sampler_of(pipe, None, {**settings, "callback_on_step_end": ended}, "np")
                make(text, generator_of(0))

            with Console(stderr=True).status("") as status:
                rows = measure(pipe, run, guidance, rounds, status.update)
        plain = rows[0]
        data = [
            {
                "execution": row.name,
                "seconds": row.median,
                "quartiles": row.quartiles,
                "relative": row.median / plain.median,
                "peak_bytes": row.peak,
                "steps": len(row.seconds),
            }
            for row in rows
        ]
        if as_json:
            typer.echo(json.dumps(data, indent=1))
            return
        table = Table(
            title=f"{type(pipe).__name__} on {source.where}, {source.numbers}: one step", title_justify="left"
        )
        for name in ("way", "ms", "quartiles", "x plain", "peak GiB"):
            table.add_column(name, justify="left" if name == "way" else "right")
        for row in rows:
            low, high = (f"{1000 * value:.1f}" for value in row.quartiles)
            peak = "-" if row.peak is None else f"{row.peak / 2**30:.2f}"
            table.add_row(
                row.name, f"{1000 * row.median:.1f}", f"{low}-{high}", f"{row.median / plain.median:.3f}", peak
            )
        Console().print(table)


def _check_all(source: Source, columns: list[list[int | str]], modes: list[str]) -> None:
    """Check every combination, as `_check` does."""
    models = source.denoisers().values()
    for model in models:
        for column in columns:
            for mode in modes:
                stg.check(model, column, mode)


def _check(source: Source, guidance: dict[str, Any]) -> None:
    """Check the settings of guidance on models without weights, before gigabytes are loaded.

    Raises:
        StgError: as `apply` does.
    """
    for model in source.denoisers().values():
        stg.apply(model, **guidance, batched_cfg=True, guidance_scale=1.0).not_to_be_entered()
