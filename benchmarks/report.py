"""Tables of what the benchmark has measured, for a terminal and in Markdown."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import contestants

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
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print(f"\n{title}")
    for row in (head, *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]))
    sys.stdout.flush()


def markdown(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    made = (
        f"{where}; torch {machine['torch']}, diffusers {machine['diffusers']}, {settings['dtype']}, "
        f"medians of {settings['rounds']} interleaved rounds ({settings['clock']} time). "
        + ("Weights are brought to the device in each pass. " if settings["offload"] else "")
        + "Made by `python -m benchmarks.cost`."
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
