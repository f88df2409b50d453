"""What a guided step costs: time, FLOPs and peak memory of five ways to compute it, on the shapes of seven models.

    python -m benchmarks.cost                               all models at reduced width, one CPU thread, some minutes
    python -m benchmarks.cost --quick --models mochi        does it run?
    python -m benchmarks.cost --device cuda --full-size     real widths, random bfloat16 weights made on the device

The models have their real classes, depths and block structure. A complete run writes JSON, a Markdown table and a plot
to benchmarks/results/; other runs write where --out says.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop
if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import torch
from torch import Tensor, nn

import stg_hooks as stg
from benchmarks import contestants, measure
from benchmarks.shapes import SHAPES, Inputs, Shape, Size

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GUIDED = ("three", "full", "sequential", "batched")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    diffusers.logging.set_verbosity_error()
    device = torch.device(options.device)
    names = [name for name in options.contestants if contestants.available(name)]
    for name in options.contestants:
        if name not in names:
            print(f"left out: {contestants.TITLES[name]}, which this version of stg_hooks does not have")
    results: dict[str, Any] = {
        "machine": measure.machine(device),
        "settings": {
            "device": device.type,
            "dtype": options.dtype,
            "full_size": options.full_size,
            "rounds": options.repeats,
            "clock": options.clock,
            "guidance_scale": contestants.GUIDANCE_SCALE,
            "scale": contestants.SCALE,
            "peak_memory": "bytes in use at once during the call, above those in use before it",
        },
        "models": [],
    }
    started = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results["hooks"] = hooks(names, device, 20 if options.quick else 300)
        show(*hooks_table(results["hooks"]), HOOKS)
        for name in options.models:
            result = with_less_if_needed(SHAPES[name], names, options)
            results["models"].append(result)
            show(*table(result), heading(result))
            print("\n".join(remarks(result, results["hooks"])))
        if options.curves:
            results["curves"] = curves(SHAPES["mochi"], names, options)
    results["seconds"] = round(time.perf_counter() - started)
    write(results, options)
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--full-size", action="store_true", help="real widths and resolutions (for a GPU; Wan 14B needs some 60 GiB)")
    add("--quick", action="store_true", help="tiny widths, two rounds, one model unless --models says otherwise")
    add("--models", nargs="+", choices=list(SHAPES), metavar="NAME", help=", ".join(SHAPES))
    add(
        "--contestants", nargs="+", choices=list(contestants.TITLES), metavar="NAME", help=", ".join(contestants.TITLES)
    )
    add("--repeats", type=int, help="rounds that are timed, each with every contestant (7; 3 at full size)")
    add("--tokens", type=int, help="give all models about this many tokens")
    add("--threads", type=int, default=1, help="CPU threads (1)")
    add(
        "--clock",
        default="wall",
        choices=list(measure.CLOCKS),
        help="cpu: time on the CPU, for a machine that is shared",
    )
    add("--dtype", choices=list(DTYPES), help="float32; at full size bfloat16")
    add(
        "--curves",
        action=argparse.BooleanOptionalAction,
        help="cost over tokens and over the skipped layer, and a plot",
    )
    add(
        "--out", type=Path, metavar="FILE.json", help="where to write; tables go to .md beside it, the plot to cost.png"
    )
    options = parser.parse_args(arguments)
    complete = not (options.models or options.contestants or options.tokens or options.quick)
    if options.curves is None:
        options.curves = complete and not options.full_size
    if options.out is None and complete:
        options.out = RESULTS / f"cost-{options.device}{'-full' if options.full_size else ''}.json"
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu says nothing about another device")
    options.models = options.models or (["mochi"] if options.quick else list(SHAPES))
    options.contestants = options.contestants or list(contestants.TITLES)
    options.repeats = options.repeats or (2 if options.quick else 3 if options.full_size else 7)
    options.dtype = options.dtype or ("bfloat16" if options.full_size else "float32")
    options.size = "tiny" if options.quick else "full" if options.full_size else "small"
    return options


# --- measuring --------------------------------------------------------------------------------------------------------


def with_less_if_needed(shape: Shape, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure a model; where memory does not suffice, with half as many tokens."""
    size = shape.resized(getattr(shape, options.size), options.tokens)
    while True:
        try:
            return model_results(shape, size, names, options)
        except torch.OutOfMemoryError:
            print(f"{shape.title}: out of memory with {size.tokens} tokens")
            fewer = shape.resized(getattr(shape, options.size), size.tokens // 2)
            if fewer.tokens >= size.tokens:
                raise
            size = fewer
        gc.collect()
        torch.cuda.empty_cache()


def model_results(shape: Shape, size: Size, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    device, clock = torch.device(options.device), measure.CLOCKS[options.clock]
    model = shape.build(size, options.device, DTYPES[options.dtype])
    inputs = shape.inputs(model, size)
    layers = [layer.module for layer in stg.layers(model) if layer.index is not None]
    field = {name: contestants.build(name, shape, model, inputs, shape.skipped) for name in names}
    plain = contestants.build("plain", shape, model, inputs, shape.skipped)
    total, own, after = measure.flops_of(layers, plain.step)
    result: dict[str, Any] = {
        "name": shape.name,
        "title": shape.title,
        "model": shape.model,
        "layers": len(layers),
        "skipped": shape.skipped,
        "cfg": shape.cfg,
        "size": {"what": size.what, "tokens": size.tokens, "text_tokens": size.text, "config": dict(size.config)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "plain_flops": total,
        "bound": {
            # What a weak pass cannot share: all that runs after the skipped layer, on the cond rows.
            "flops": 1 + after[shape.skipped] / shape.rows / total,
            "blocks": 1 + sum(own[shape.skipped + 1 :]) / shape.rows / total if shape.blocks else None,
            "formula": shape.formula(),
        },
        "hidden_state_bytes": hidden_state_bytes(layers[shape.skipped], plain.step) // shape.rows,
        "contestants": {name: {"title": contestants.TITLES[name]} for name in names},
    }
    predictions: dict[str, Tensor] = {}
    for name, contestant in field.items():
        entry = result["contestants"][name]
        try:
            predictions[name] = look_at(contestant, entry, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what fails is told; the others are still worth measuring
            entry["notes"] = [f"failed: {type(error).__name__}: {error}"]
            continue
        entry["flops_ratio"] = entry["flops"] / total
    field = {name: contestant for name, contestant in field.items() if name in predictions}
    if "full" in predictions:
        reference = predictions["full"].float()
        for name in set(predictions) & set(GUIDED):
            difference = (predictions[name].float() - reference).abs().max() / reference.std()
            result["contestants"][name]["difference"] = float(difference)
    predictions.clear()
    times = measure.interleaved({n: (c.step, c.session) for n, c in field.items()}, options.repeats, device, clock)
    evaluate(result, times)
    return result


def look_at(contestant: contestants.Contestant, entry: dict[str, Any], device: torch.device) -> Tensor:
    """Find out all but the time; this warms up as well."""
    with contestant.session():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", stg.StgWarning)
            entry["first_flops"] = measure.flops(contestant.step)  # may contain a check that is made once
        entry["notes"] = [str(warning.message) for warning in caught]
        entry["flops"] = measure.flops(contestant.step)
        prediction, entry["peak_bytes"] = measure.peak_memory(contestant.step, device)
    return prediction


def hidden_state_bytes(layer: nn.Module, call: Any) -> int:
    """Measure what flows between two blocks."""
    sizes = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        streams = output if isinstance(output, tuple) else (output,)
        sizes.append(sum(stream.numel() * stream.element_size() for stream in streams if isinstance(stream, Tensor)))

    handle = layer.register_forward_hook(look, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return sizes[0]


def evaluate(result: dict[str, Any], times: measure.Times) -> None:
    bound = result["bound"]["flops"]
    for name, seconds in times.items():
        entry = result["contestants"][name]
        entry |= {"seconds": seconds, "median": statistics.median(seconds), "quartiles": measure.spread(seconds)}
        if "plain" in times:
            entry["time_ratio"] = measure.bootstrap(times, lambda t, n=name: t[n] / t["plain"])
        if "plain" in result["contestants"]:
            extra = entry["peak_bytes"] - result["contestants"]["plain"]["peak_bytes"]
            entry["extra_peak_in_hidden_states"] = extra / result["hidden_state_bytes"]
            entry["peak_ratio"] = entry["peak_bytes"] / result["contestants"]["plain"]["peak_bytes"]
        if name in ("sequential", "batched"):
            entry["flops_over_bound"] = entry["flops_ratio"] / bound - 1
            if "plain" in times:
                entry["time_over_bound"] = entry["time_ratio"]["value"] / bound - 1
    if "plain" in times and "full" in times:
        full = result["contestants"]["full"]["flops_ratio"]
        result["extra_of_full"] = {
            "bound": (bound - 1) / (full - 1),
            **{name: extra_of_full(times, name) for name in ("three", "sequential", "batched") if name in times},
        }


def extra_of_full(times: measure.Times, name: str) -> dict[str, float]:
    """Compare the time that guidance adds with the time that a full extra pass adds."""
    return measure.bootstrap(times, lambda t: (t[name] - t["plain"]) / (t["full"] - t["plain"]))


class Nothing(nn.Module):
    """A block that computes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        return x  # noqa: RET504 - by its name stg_hooks reads what is handed through


class Nothings(nn.Module):
    """As many blocks as Mochi has: all that guidance takes here is taken by hooks."""

    def __init__(self, depth: int = 48) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Nothing() for _ in range(depth))

    def forward(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


def hooks(names: Sequence[str], device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure what hooks take, in a model that computes nothing."""
    model = Nothings().to(device)
    inputs: Inputs = {"x": torch.randn(2, 4, 8, device=device)}
    chosen = ["plain", *(name for name in ("idle", "sequential", "batched") if name in names)]
    field = {name: contestants.build(name, SHAPES["mochi"], model, inputs, 34) for name in chosen}
    for contestant in field.values():
        with contestant.session():
            contestant.step()
    times = measure.interleaved({n: (c.step, c.session) for n, c in field.items()}, rounds, device)
    guide = stg.apply(model, layers=[34], scale=1.0, batched_cfg=True)
    entering = []
    for _ in range(rounds):
        start = time.perf_counter()
        guide.__enter__()
        middle = time.perf_counter()
        guide.__exit__(KeyboardInterrupt, None, None)  # nothing was guided, which is fine here
        entering.append((middle - start, time.perf_counter() - middle))
    return {
        "blocks": 48,
        "plain_us": 1e6 * statistics.median(times["plain"]),
        "added_us": {
            name: {
                key: 1e6 * value
                for key, value in measure.bootstrap(times, lambda t, n=name: t[n] - t["plain"], 500).items()
            }
            for name in chosen[1:]
        },
        "enter_us": 1e6 * statistics.median(enter for enter, _ in entering),
        "leave_us": 1e6 * statistics.median(leave for _, leave in entering),
    }


def curves(shape: Shape, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure the cost over the place of the skipped layer, and over the number of tokens."""
    assert shape.blocks is not None
    size: Size = getattr(shape, options.size)
    tokens = {"tiny": (16, 32), "small": (32, 64, 128, 256, 512), "full": (1024, 4096, 16384)}[options.size]
    few = {"tiny": 16, "small": 128, "full": 4096}[options.size]
    last = shape.blocks - 1
    layers = sorted({round(last * part / 6) for part in range(7)} | {shape.skipped}) if not options.quick else [0, 34]
    position = [point(shape, size.with_tokens(few), layer, names, options) for layer in layers]
    over_tokens = [point(shape, size.with_tokens(count), shape.skipped, names, options) for count in tokens]
    return {
        "title": f"{shape.title} shape",
        "blocks": shape.blocks,
        "published": shape.skipped,
        "position": position,
        "tokens": over_tokens,
    }


def point(shape: Shape, size: Size, skipped: int, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    device, clock = torch.device(options.device), measure.CLOCKS[options.clock]
    model = shape.build(size, options.device, DTYPES[options.dtype])
    inputs = shape.inputs(model, size)
    chosen = ["plain", *(name for name in names if name in GUIDED)]
    field = {}
    for name in chosen:
        contestant = contestants.build(name, shape, model, inputs, skipped)
        try:
            with contestant.session():
                contestant.step()
        except Exception as error:
            print(f"  {contestants.TITLES[name]} failed: {type(error).__name__}: {error}")
            continue
        field[name] = contestant
    rounds = max(2, (options.repeats + 1) // 2)
    times = measure.interleaved({n: (c.step, c.session) for n, c in field.items()}, rounds, device, clock)
    ratio = {
        name: measure.bootstrap(times, lambda t, n=name: t[n] / t["plain"], 500) for name in field if name != "plain"
    }
    print(
        f"  layer {skipped}, {size.tokens} tokens: ", *(f"{n} {r['value']:.3f}" for n, r in ratio.items()), flush=True
    )
    return {
        "skipped": skipped,
        "tokens": size.tokens,
        "bound": shape.formula(skipped),
        "plain_seconds": statistics.median(times["plain"]),
        "ratio": ratio,
    }


# --- telling ----------------------------------------------------------------------------------------------------------

HOOKS = "Hooks alone: 48 blocks that compute nothing, layer 34 skipped, [uncond, cond]"
Table = tuple[list[str], list[list[str]]]


def heading(result: dict[str, Any]) -> str:
    size, cfg = result["size"], "CFG" if result["cfg"] else "no CFG"
    return (
        f"{result['title']}: {result['layers']} layers, {result['skipped']} skipped, {cfg}; "
        f"{size['tokens']} + {size['text_tokens']} tokens, {result['parameters'] / 1e6:.0f} M parameters "
        f"({size['what']})"
    )


def table(result: dict[str, Any]) -> Table:
    rows = []
    for name, entry in result["contestants"].items():
        if "median" not in entry:
            rows.append([entry["title"], "failed", *[""] * 7])
            continue
        low, high = entry["quartiles"]
        time_ratio = entry.get("time_ratio")
        extra = result.get("extra_of_full", {}).get(name)
        rows.append(
            [
                entry["title"],
                f"{entry['flops'] / 1e9:.3g}",
                f"{entry['flops_ratio']:.3f}",
                f"{result['bound']['flops']:.3f}" if name in ("sequential", "batched") else "",
                f"{1e3 * entry['median']:.4g} ({1e3 * low:.4g}-{1e3 * high:.4g})",
                f"{time_ratio['value']:.3f}" if time_ratio else "",
                f"{extra['value']:.2f} ({extra['low']:.2f}-{extra['high']:.2f})" if extra else "",
                f"{entry['peak_bytes'] / 2**20:.2f}",
                f"{entry['difference']:.0e}" if entry.get("difference") else "",
            ]
        )
    head = [
        "",
        "GFLOPs",
        "x plain",
        "bound",
        "ms (quartiles)",
        "x plain",
        "extra / full's extra (95 %)",
        "peak MiB",
        "diff",
    ]
    return head, rows


def remarks(result: dict[str, Any], hooks: dict[str, Any]) -> list[str]:
    lines = []
    idle = result["contestants"].get("idle", {})
    if "time_ratio" in idle:
        low, high = (100 * (idle["time_ratio"][side] - 1) for side in ("low", "high"))
        share = hooks["added_us"]["idle"]["value"] / 1e6 / result["contestants"]["plain"]["median"]
        measured = f"{100 * (idle['time_ratio']['value'] - 1):+.2f} % of a step (95 %: {low:+.2f} to {high:+.2f})"
        lines.append(f"Scale 0: {measured}; the hooks alone, without the noise: {100 * share:.3f} %.")
    if "extra_of_full" in result:
        lines.append(f"Bound of the extra time: {result['extra_of_full']['bound']:.2f} of a full extra pass's.")
    for name in ("sequential", "batched"):
        entry = result["contestants"].get(name, {})
        if "time_over_bound" in entry:
            over = f"FLOPs {100 * entry['flops_over_bound']:+.1f} %, time {100 * entry['time_over_bound']:+.1f} %"
            memory = f"{100 * (entry['peak_ratio'] - 1):+.1f} %"
            if result["bound"]["formula"]:
                memory += f" ({entry['extra_peak_in_hidden_states']:+.1f} hidden states of the cond rows)"
            lines.append(f"{entry['title']}: {over} from the bound; peak memory {memory}.")
        lines += [f"{entry['title']}: {note}" for note in entry.get("notes", [])]
    return lines


def hooks_table(result: dict[str, Any]) -> Table:
    rows = [["plain call, in all", f"{result['plain_us']:.0f}", ""]]
    rows += [
        [f"added by: {contestants.TITLES[name]}", f"{added['value']:.0f}", f"{added['low']:.0f}-{added['high']:.0f}"]
        for name, added in result["added_us"].items()
    ]
    rows += [
        ["entering the with, once", f"{result['enter_us']:.0f}", ""],
        ["leaving it", f"{result['leave_us']:.0f}", ""],
    ]
    return ["", "us", "95 %"], rows


def show(head: list[str], rows: list[list[str]], title: str) -> None:
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        print(f"\n{title}", *lines, sep="\n", flush=True)
        return
    shown = RichTable(title=title, title_justify="left")
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print("", shown)


def markdown(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    made = (
        f"{where}; torch {machine['torch']}, diffusers {machine['diffusers']}, {settings['dtype']}, "
        f"medians of {settings['rounds']} interleaved rounds ({settings['clock']} time). "
        "Made by `python -m benchmarks.cost`."
    )
    columns = (
        "*bound*: FLOPs of a plain call plus those of everything that runs after the skipped layer, on the cond rows. "
        "*extra / full's extra*: added time over the time that a full extra pass adds. "
        f"*peak*: {settings['peak_memory']}. *diff*: max |difference| from the full extra pass / std."
    )
    parts = ["# What a guided step costs", made, columns]
    for result in results["models"]:
        parts += [f"## {result['title']}", heading(result).split(": ", 1)[1], _markdown(*table(result))]
        parts += ["\n".join(f"- {line}" for line in remarks(result, results["hooks"]))]
    title, text = HOOKS.split(": ", 1)
    parts += [f"## {title}", text, _markdown(*hooks_table(results["hooks"]))]
    return "\n\n".join(parts) + "\n"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    if options.out is None:
        print("\nnothing written: a part of the benchmark, and no --out")
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files = [options.out, options.out.with_suffix(".md")]
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    files[1].write_text(markdown(results))
    if "curves" in results:
        from benchmarks import plots

        files.append(options.out.parent / ("cost.png" if options.device == "cpu" else f"cost-{options.device}.png"))
        plots.draw(results, files[-1])
    print("\nwritten:", *(file.name for file in files))


if __name__ == "__main__":
    main()
