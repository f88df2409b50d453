"""What a guided step costs: time, FLOPs and peak memory of the ways to compute it, on the shapes of eight models.

    python -m benchmarks.cost                               all models at reduced width, on one core, 40 minutes
    python -m benchmarks.cost --quick --models mochi        does it run?
    python -m benchmarks.cost --device cuda --full-size     real widths, random bfloat16 weights made on the device

The models have their real classes, depths and block structure. On a CPU the process keeps to one core, and what is
counted is its time on that core. Each contestant's step stands between two plain ones (`measure.in_turns`). The quarter
of these turns in which the machine was least steady is left out (`measure.steady`). Turns are made until the ratio to
the plain step is known to +-0.03 (95 %), or the time is up.
A complete run writes JSON, a Markdown table and a chart to benchmarks/results/; other runs write where --out says.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import stg_hooks as stg
from benchmarks import contestants, measure, overhead, report
from benchmarks.shapes import SHAPES, Shape, Size

RESULTS = Path(__file__).resolve().parent / "results"
CHART = RESULTS.parents[1] / "docs" / "images" / "cost.png"
"""Where the chart of a complete run on a CPU goes: pages show it."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GUIDED = contestants.GUIDED
LEAST_TURNS = 12


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    pinned = options.device == "cpu" and options.threads == 1 and measure.pin()
    diffusers.logging.set_verbosity_error()
    device = torch.device(options.device)
    results: dict[str, Any] = {
        "machine": {**measure.machine(device), "pinned": pinned},
        "settings": {
            "device": device.type,
            "dtype": options.dtype,
            "full_size": options.full_size,
            "offload": options.offload,
            "within": options.within,
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
        clock, turns = measure.CLOCKS[options.clock], 10 if options.quick else 200
        results["hooks"] = overhead.hooks(device, clock, lambda made: len(made) >= turns)
        report.show(*report.hooks_table(results["hooks"]), report.HOOKS)
        for i, name in enumerate(options.models):
            left = started + 60 * options.minutes - time.perf_counter()
            options.deadline = time.perf_counter() + left / (len(options.models) - i)
            result = with_less_if_needed(SHAPES[name], options)
            results["models"].append(result)
            report.show(*report.table(result), report.heading(result))
            print("\n".join(report.remarks(result)), flush=True)
            results["seconds"] = round(time.perf_counter() - started)
            write(results, options)  # what has been measured is kept, whatever comes
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
    add("--repeats", type=int, help="so many turns of each contestant, however well the ratios are known")
    add("--within", type=float, default=0.03, help="how well each ratio is to be known (0.03, with 95 %%)")
    add("--minutes", type=float, default=40.0, help="when to stop, however well they are known (40)")
    add("--tokens", type=int, help="give all models about this many tokens")
    add("--threads", type=int, default=1, help="CPU threads (1)")
    add(
        "--clock",
        choices=list(measure.CLOCKS),
        help="cpu: time on the CPU, for a machine that is shared (the default there)",
    )
    add("--offload", action="store_true", help="bring weights to the device in each pass (from the disk on a CPU)")
    add("--dtype", choices=list(DTYPES), help="float32; at full size bfloat16")
    add(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="where to write; tables go to .md beside it, a chart to .png",
    )
    options = parser.parse_args(arguments)
    complete = not (options.models or options.contestants or options.tokens or options.quick or options.offload)
    if options.out is None and complete:
        options.out = RESULTS / f"cost-{options.device}{'-full' if options.full_size else ''}.json"
    options.clock = options.clock or ("cpu" if options.device == "cpu" else "wall")
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu says nothing about another device")
    options.models = options.models or (["mochi"] if options.quick else list(SHAPES))
    options.contestants = ["plain", *(options.contestants or contestants.TITLES)]
    options.repeats = options.repeats or (2 if options.quick else None)
    options.dtype = options.dtype or ("bfloat16" if options.full_size else "float32")
    options.size = "tiny" if options.quick else "full" if options.full_size else "small"
    return options


def until(deadline: float, within: float) -> Callable[[list[measure.Turn]], bool]:
    """Make what tells that there are turns enough: the ratio is known well enough, or the time is up."""

    def enough(turns: list[measure.Turn]) -> bool:
        if len(turns) < LEAST_TURNS:
            return False
        if time.perf_counter() > deadline:
            return True
        if len(turns) % 4:
            return False
        found = measure.estimate(measure.ratio, measure.steady(turns), draws=500)
        return found["high"] - found["low"] <= 2 * within

    return enough


# --- measuring --------------------------------------------------------------------------------------------------------


def with_less_if_needed(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a model; where memory does not suffice, with half as many tokens."""
    size = shape.resized(getattr(shape, options.size), options.tokens)
    while True:
        try:
            return model_results(shape, size, options)
        except torch.OutOfMemoryError:
            print(f"{shape.title}: out of memory with {size.tokens} tokens")
            fewer = shape.resized(getattr(shape, options.size), size.tokens // 2)
            if fewer.tokens >= size.tokens:
                raise
            size = fewer
        gc.collect()
        torch.cuda.empty_cache()


def build(shape: Shape, size: Size, options: argparse.Namespace) -> nn.Module:
    model = shape.build(size, options.device, DTYPES[options.dtype])
    if options.offload:
        import accelerate

        if options.device == "cpu":  # the system's cache holds them: a fast disk
            folder = tempfile.TemporaryDirectory(prefix="weights-")
            weakref.finalize(model, folder.cleanup)
            return accelerate.disk_offload(model, folder.name, execution_device=torch.device("cpu"))
        return accelerate.cpu_offload(model.cpu(), execution_device=torch.device(options.device))
    return model


def model_results(shape: Shape, size: Size, options: argparse.Namespace) -> dict[str, Any]:
    device, clock = torch.device(options.device), measure.CLOCKS[options.clock]
    model = build(shape, size, options)
    inputs = shape.inputs(model, size, options.device)
    layers = [layer.module for layer in stg.layers(model) if layer.index is not None]
    names = [name for name in dict.fromkeys(options.contestants) if name in contestants.of(shape)]
    field = {name: contestants.build(name, shape, model, inputs, shape.skipped) for name in names}
    plain = field["plain"]
    total, own, after = measure.flops_of(layers, plain.step)
    computed = own[shape.skipped] if shape.mode != "residual" else 0
    rows = 1 if shape.guiders else shape.rows  # of the call in which the layers were seen last
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
            # What a weak pass cannot share: all that runs after the skipped layer, on the cond rows; and that layer
            # itself, where its mode computes it.
            "flops": 1 + (after[shape.skipped] + computed) / rows / total,
            "blocks": 1 + sum(own[shape.skipped + 1 :]) / rows / total if shape.blocks else None,
            "formula": shape.formula(),
        },
        "hidden_state_bytes": measure.hidden_state_bytes(layers[shape.skipped], plain.step) // rows,
        "contestants": {name: {"title": contestants.TITLES[name]} for name in names},
    }
    predictions: dict[str, Tensor] = {}
    for name, contestant in field.items():
        entry = result["contestants"][name]
        predictions[name] = look_at(contestant, entry, device)
        entry["flops_ratio"] = entry["flops"] / total
    if reference_name := next((name for name in ("full", "slg") if name in predictions), None):
        reference = predictions[reference_name].float()
        for name in set(predictions) & set(GUIDED):
            difference = (predictions[name].float() - reference).abs().max() / reference.std()
            result["contestants"][name]["difference"] = float(difference)
    predictions.clear()
    calls = {n: (c.step, c.session) for n, c in field.items() if n != "plain"}
    repeats, enough = options.repeats, until(options.deadline, options.within)
    turns = measure.in_turns(
        calls, (plain.step, plain.session), device, clock, (lambda made: len(made) >= repeats) if repeats else enough
    )
    evaluate(result, turns)
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


def evaluate(result: dict[str, Any], turns: dict[str, list[measure.Turn]]) -> None:
    field, bound = result["contestants"], result["bound"]["flops"]
    steady = {name: measure.steady(own) for name, own in turns.items()}
    seconds = {name: [turn.own for turn in own] for name, own in turns.items()}
    seconds["plain"] = [turn.before for own in turns.values() for turn in own]
    plain = field["plain"]
    for name, entry in field.items():
        entry |= {"median": statistics.median(seconds[name]), "quartiles": measure.spread(seconds[name])}
        entry["extra_peak_in_hidden_states"] = (entry["peak_bytes"] - plain["peak_bytes"]) / result[
            "hidden_state_bytes"
        ]
        entry["peak_ratio"] = entry["peak_bytes"] / plain["peak_bytes"]
        if name == "plain":
            continue
        entry["turns"] = {"made": turns[name], "steady": len(steady[name])}
        entry["time_ratio"] = measure.estimate(measure.ratio, steady[name])
        if name in contestants.OURS:
            entry["flops_over_bound"] = entry["flops_ratio"] / bound - 1
            entry["time_over_bound"] = entry["time_ratio"]["value"] / bound - 1
    if "full" in turns:
        result["extra_of_full"] = {
            "bound": (bound - 1) / (field["full"]["flops_ratio"] - 1),
            **{
                name: measure.estimate(extra_of_full, steady[name], steady["full"])
                for name in ("three", "sequential", "batched")
                if name in turns
            },
        }


def extra_of_full(turns: Sequence[measure.Turn], full: Sequence[measure.Turn]) -> float:
    """Compare the time that guidance adds with the time that a full extra pass adds."""
    return (measure.ratio(turns) - 1) / (measure.ratio(full) - 1)


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    if options.out is None:
        print("\nnothing written: a part of the benchmark, and no --out")
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files = [options.out, options.out.with_suffix(".md")]
    numbers = re.compile(r"\[\s+([^\[\]{}\"]+?)\s+\]")  # a list of them fits on a line
    text = numbers.sub(lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", json.dumps(results, indent=1))
    files[0].write_text(text + "\n")
    files[1].write_text(report.markdown(results))
    if not options.quick and any("time_ratio" in c for r in results["models"] for c in r["contestants"].values()):
        from benchmarks import plots

        files.append(CHART if options.out == RESULTS / "cost-cpu.json" else options.out.with_suffix(".png"))
        plots.draw(results, files[-1])
    print("\nwritten:", *(file.name for file in files))


if __name__ == "__main__":
    main()
