"""Tables of what the benchmark has measured, for a terminal and in Markdown."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import contestants, overhead

HOOKS = "Hooks alone: added to a step of models whose blocks compute nothing"
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
        rows.append(
            [
                entry["title"],
                _of_95(time_ratio) if time_ratio else "",
                f"{entry['flops_ratio']:.3f}",
                f"{result['bound']['flops']:.3f}" if name in contestants.OURS else "",
                f"{1e3 * entry['median']:.4g} ({1e3 * low:.4g} to {1e3 * high:.4g})",
                f"{entry['flops'] / 1e9:.3g}",
                f"{entry['peak_bytes'] / 2**20:.2f}",
                f"{entry['difference']:.0e}" if entry.get("difference") else "",
            ]
        )
    head = ["", "time, x plain (95 %)", "FLOPs, x plain", "bound", "ms (quartiles)", "GFLOPs", "peak MiB", "diff"]
    return head, rows


def _of_95(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def remarks(result: dict[str, Any]) -> list[str]:
    lines = []
    made = [len(entry["turns"]["made"]) for entry in result["contestants"].values() if "turns" in entry]
    if made:
        lines.append(f"{min(made)} to {max(made)} turns of each.")
    if "extra_of_full" in result:
        lines.append(f"Bound of the extra time: {result['extra_of_full']['bound']:.2f} of a full extra pass's.")
    for name in contestants.OURS:
        entry = result["contestants"].get(name, {})
        if "time_over_bound" in entry:
            over = f"FLOPs {100 * entry['flops_over_bound']:+.1f} %, time {100 * entry['time_over_bound']:+.1f} %"
            memory = f"{100 * (entry['peak_ratio'] - 1):+.1f} %"
            lines.append(f"{entry['title']}: {over} from the bound; peak memory {memory}.")
        lines += [f"{entry['title']}: {note}" for note in entry.get("notes", [])]
    return lines


def hooks_table(results: list[dict[str, Any]]) -> Table:
    def us(value: dict[str, float]) -> str:
        return f"{value['value']:.0f} ({value['low']:.0f} to {value['high']:.0f})"

    rows = [
        ["the plain step: one call on [uncond, cond]", *(f"{r['plain_us']['rows']:.0f}" for r in results)],
        ["the plain step: a call each", *(f"{r['plain_us']['calls']:.0f}" for r in results)],
        *([title, *(us(r["added_us"][name]) for r in results)] for name, title in overhead.TITLES.items()),
        ["entering the `with`, once", *(f"{r['enter_us']:.0f}" for r in results)],
        ["leaving it", *(f"{r['leave_us']:.0f}" for r in results)],
    ]
    return ["us (95 %)", *(f"{r['blocks']} blocks, {r['skipped']} skipped" for r in results)], rows


def show(head: list[str], rows: list[list[str]], title: str) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    print(f"\n{title}")
    for row in (head, *rows):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]))
    sys.stdout.flush()


def markdown(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    cores = f"{machine['threads']} of {machine['cores']} cores{', pinned' if machine.get('pinned') else ''}"
    where = machine.get("gpu") or f"{machine['cpu']}, {cores}"
    made = (
        f"{where}; torch {machine['torch']}, diffusers {machine['diffusers']}, Python {machine['python']}, "
        f"{settings['dtype']}. Each step is timed between two plain ones ({settings['clock']} time), until its ratio "
        f"to them is known to +-{settings['within']} with 95 % or the time is up. The quarter of these turns in which "
        "the machine changed its speed most, from one plain step to the next, is left out. "
        + ("Weights are brought to the device in each pass. " if settings["offload"] else "")
        + "Made by `python -m benchmarks.cost`."
    )
    columns = (
        "*bound*: FLOPs of a plain step plus those of everything that runs after the skipped layer, on the cond rows "
        "(LTX-2: and of that layer, whose attention alone is skipped). "
        f"*peak*: {settings['peak_memory']}. *diff*: max |difference| from the full extra pass / std."
    )
    parts = ["# What a guided step costs", made, columns]
    for result in results["models"]:
        parts += [f"## {result['title']}", heading(result).split(": ", 1)[1], _markdown(*table(result))]
        parts += ["\n".join(f"- {line}" for line in remarks(result))]
    title, text = HOOKS.split(": ", 1)
    text = f"{text[0].upper()}{text[1:]}: stg.apply to one call on [uncond, cond], the others to a call each."
    parts += [f"## {title}", text, _markdown(*hooks_table(results["hooks"]))]
    return "\n\n".join(parts) + "\n"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
