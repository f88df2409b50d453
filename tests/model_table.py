"""Write docs/models.md: what of every denoiser of diffusers can be skipped, and how, and which other models were tried.

python -m tests.model_table
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.further_repositories import FURTHER
from tests.installed import DIFFUSERS
from tests.more_repositories import MORE
from tests.repositories import REPOSITORIES
from tests.tiny_models import EXPLAINED, MODELS, Tiny

FILE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

INTRODUCTION = f"""# Models

The {len(MODELS)} transformers and U-Nets that diffusers {DIFFUSERS} exports. For each of them, tests prove on a tiny
random model that

- its layers are found and numbered in the order in which they run;
- a skipped block of each kind equals a copy of the model with that block replaced by hand, and leaves no trace;
- with `mode="values"`, it equals the model with each token's own value given out by hand (where torch's attention
  function computes it; elsewhere, that it has an effect and leaves no trace);
- with `mode="attention"`, a video token attends to itself and to the text, also where a model has put both together
  before its blocks (Flux 2, Chroma, AuraFlow, Lumina 2, Z-Image, HiDream and others): which tokens are text is found by
  running up to the block with other latents, twice for each layout of a call;
- a guided call equals the textbook's two passes, with rows that are all conditional and with `[uncond, cond]` rows, in
  every `execution`.

No class is known by name: all this is found by looking at the model, and holds for models of your own that are built
like these. The column of exceptions says where something is refused, with an error, or falls back to the next best way,
with a warning. "Attention" stands for the modes that replace self-attention (`"attention"`, `"values"` and the like);
"rows" for calls with `[uncond, cond]` rows, whose arguments cannot be cut, so that weak passes are made with all rows;
"batched" for `execution="batched"`, which falls back to `"sequential"`; "sharing" for `"sequential"`, which falls back
to `"full"`.

Written by `python -m tests.model_table`.

| model | numbered layers | by name only | a skipped block returns what it was given as | exceptions |
| --- | --- | --- | --- | --- |
"""

ORIGINALS = """
## Models as their authors publish them

`python -m tests.repositories PATH` builds a tiny random model of each of these repositories that it finds below a
folder, and compares what `skip`, `apply` and `Guider` give in the modes `"residual"`, `"values"` and `"attention"` with
a deep copy in which the block was changed by hand: the first and the last block of each class. None of them is shipped
here. At these commits all that it tries is right, or refused with an error where the table says so. Kernels that need a
GPU are replaced by a function that torch cannot look into either; none of these needs a line of adapter, as the
functions of flash-attention, xformers, SageAttention, ComfyUI and Wan are listed in `stg_hooks.adapters` already. A
kernel of your own needs one: the error that asks for it prints it.

| repository | commit | attention is computed by | note |
| --- | --- | --- | --- |
"""


def page() -> str:
    """Return the whole page."""
    rows = [row(name, tiny) for name, tiny in MODELS.items()]
    rows += [f"| {name} | - | - | - | {why} |" for name, why in EXPLAINED.items()]
    originals = [f"| {r.name} | {r.commit} | {r.kernel} | {r.note} |" for r in (*REPOSITORIES, *FURTHER, *MORE)]
    return INTRODUCTION + "\n".join(rows) + "\n" + ORIGINALS + "\n".join(originals) + "\n"


def row(name: str, tiny: Tiny) -> str:
    """Return one line of the table."""
    exceptions = [
        ("attention", tiny.attention),
        ("rows", tiny.rows),
        ("batched", tiny.batched or tiny.rows),
        ("sharing", tiny.alone),
    ]
    reasons: dict[str, list[str]] = {}
    for what, why in exceptions:
        if why:
            reasons.setdefault(why, []).append(what)
    notes = [f"{', '.join(what)}: {why[0].lower()}{why[1:]}" for why, what in reasons.items()]
    remarks = " ".join([*notes, tiny.note]).strip()
    cells = [name, code(tiny.layers), code(tiny.named), code(dict.fromkeys(tiny.skips.values())), remarks]
    return f"| {' | '.join(cells)} |"


def code(values: Iterable[str]) -> str:
    """Set values in code, one after the other."""
    return "; ".join(f"`{value}`" for value in values)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
