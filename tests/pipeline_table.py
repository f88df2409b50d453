"""Write docs/pipelines.md: what `stg.apply` reads in the code of every pipeline class of the installed diffusers.

python -m tests.pipeline_table
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import diffusers

from stg_hooks.integrations.diffusers.call_sites import CallSite, RowSplit, UnreadableError
from stg_hooks.integrations.diffusers.host import DENOISERS
from stg_hooks.integrations.diffusers.pipeline_code import call_sites_of
from tests.parted_pipelines import PARTED, WHOLE
from tests.stock_pipelines import tested

FILE = Path(__file__).resolve().parents[1] / "docs" / "pipelines.md"


REFUSED = {
    "AnyFlowFAR": "it hands a cache of keys and values from chunk to chunk, filled in calls that predict nothing.",
    "Ideogram 4": "cond and uncond come from two models, and its cond call predicts text tokens as well.",
    "LEdits++ (two), Semantic, Safe": "each adds terms that depend on thresholds, and on quantiles, of the differences "
    "of its predictions; what is added to all of them does not come through as it is.",
    "Attend-and-Excite, Pix2PixZero": "they look into the attention of the U-Net after a call, and change the latents "
    "by gradients of it.",
    "SAG": "it makes degraded latents out of its uncond prediction, which guidance would change.",
    "Paradigms": "it predicts several steps at once, in rows of its own.",
    "UniDiffuser": "image and text are predicted together, and each has its own calls for uncond.",
}
"""Why the others cannot be guided, in one sentence each."""


NOTES = {
    "OmniGen with input images": "weak passes are made in full, with all rows: images are named by the row that they "
    "belong to, which a call with fewer rows would not have.",
    "Flux2KleinKV with a reference image": "the weak pass of the first step is made in full: there its blocks write "
    "keys and values into a cache that they are given.",
    "AceStep": "its CFG is APG, which projects on the cond prediction: that is the guided one. The prediction that "
    "`audio_cover_strength` mixes in gets the same term.",
    "DiffEdit": "`generate_mask()` of this diffusers gives the prompt to the rows that it calls uncond, and the "
    "negative prompt to the others, with or without guidance; the rows that it calls cond are perturbed.",
    "PAG inpainting with SDXL": 'with `output_type="latent"` diffusers leaves its PAG processors installed after the '
    "run, with or without guidance.",
}


def classes() -> dict[str, type]:
    """Return every pipeline class that diffusers exports and that has a denoiser by one of the usual names."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(dir(diffusers)):
            value = getattr(diffusers, name) if "Pipeline" in name else None
            if inspect.isclass(value) and issubclass(value, diffusers.DiffusionPipeline) and denoisers(value):
                found[name] = value
    return found


def rows_in(page: str) -> dict[str, str]:
    """Return the rows of a page's table, by the classes that they tell about."""
    return {found[1]: found[0] for found in re.finditer(r"^\| (\w*Pipeline\w*) \|.*$", page, flags=re.MULTILINE)}


def unread_in(page: str) -> list[str]:
    """Name the classes that were not read when a page was written."""
    return re.findall(r"\w*Pipeline\w*", page.partition("## Not read")[2])


def unclassified(page: str) -> set[str]:
    """Name the pipeline classes that a page does not tell about."""
    return set(classes()) - set(rows_in(page)) - set(unread_in(page))


def denoisers(cls: type) -> tuple[str, ...]:
    """Return the denoisers that a pipeline class is made of."""
    parameters = inspect.signature(cls.__init__).parameters
    return tuple(name for name in DENOISERS if name in parameters)


def reading(cls: type) -> str:
    """Say in words what is read in a pipeline's code, or why it is refused."""
    try:
        sites = call_sites_of(cls, diffusers.DiffusionPipeline, denoisers(cls))
    except UnreadableError as error:
        return f"refused: {error}"
    words = list(dict.fromkeys(_words([site for calls in sites.values() for site in calls])))
    inner = [] if words else _inner(cls)
    if not words and not inner:
        return "refused: it does not call its denoiser itself"
    return "; ".join(words) or "; ".join(f"{reading(one)}, by {one.__name__}" for one in inner)


def _inner(cls: type) -> list[type]:
    """Find the pipelines with a denoiser that a pipeline builds, and leaves the calls to."""
    init = inspect.unwrap(cls.__init__)
    made = [init.__globals__.get(name) for name in init.__code__.co_names]
    pipelines = [one for one in made if inspect.isclass(one) and issubclass(one, diffusers.DiffusionPipeline)]
    return [one for one in pipelines if denoisers(one)]


def not_read() -> list[str]:
    """Name the pipeline classes that diffusers has, and that need packages that are not installed."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name}
    return sorted(name for name, value in found.items() if ".dummy_" in getattr(value, "__module__", ""))


def _words(sites: list[CallSite]) -> Iterator[str]:
    for site in sites:
        if site.context is not None:
            yield "calls named at run time"
        elif site.kind == "both":
            yield " or ".join(map(rows_of, site.splits)) + " in one call"
        elif site.kind == "samples":
            yield "cond and uncond samples in one list"
        elif site.kind == "cond":
            yield "cond call" if site.guards is None else "cond call, uncond call"
            if site.unless is not None:
                yield f"an error while `{ast.unparse(site.unless)}`"
        elif site.kind == "perturbed":
            yield "perturbed calls of its own"


def rows_of(split: RowSplit) -> str:
    """Say which rows a call has."""
    labels = split.rows.split("+") * (2 if split.in_turn else 1)
    return f"[{', '.join(labels)}{', ...' if split.in_turn else ''}]"


def rows() -> dict[str, str]:
    """Return the rows of the classes that can be read here."""
    run = {*tested(), *PARTED, *WHOLE}
    return {
        name: f"| {name} | {', '.join(denoisers(cls))} | {reading(cls)} | {'yes' if name in run else ''} |"
        for name, cls in classes().items()
    }


def document(told: dict[str, str], unread: list[str]) -> str:
    """Return the page.

    Args:
        told: the rows of its table.
        unread: names of the classes that it has no rows for.
    """
    rows = [told[name] for name in sorted(told)]
    refused = sum("| refused: " in row for row in rows)
    return f"""# Pipelines

What `stg.apply` reads in the code of the {len(rows)} pipeline classes of diffusers {diffusers.__version__} that have a
`transformer` or `unet`: it guides {len(rows) - refused} of them and refuses {refused}, with an error before anything is
touched. Those marked as tested are run by `tests/test_pipelines.py`, `tests/test_stock_pipelines.py`,
`tests/test_parted_pipelines.py` or `tests/test_other_calls.py`. A refused pipeline can be guided through its
denoiser, `with stg.apply(pipe.transformer, ..., batched_cfg=...):`, or in a loop of your own.

In a call with several kinds of rows, `cond` are those with the whole prompt; `image` are those without the text, and
`perturbed` those of the pipeline's own attention guidance (PAG). All of them, and `uncond`, get what skip guidance
adds: the pipeline combines them with weights that sum to one. `apart` rows are not used. `rescale=` and `rule=` are
refused where there are more than one cond and one uncond prediction.

A pipeline that normalises its combined prediction to the cond one (QwenImage, Lumina2, LongCat, JoyImageEdit, Z-Image's
`cfg_normalization`, `guidance_rescale`) normalises the guided prediction to the guided cond one; `rescale=` gives the
published rescaling instead. Where calls are named at run time, by a guider, guidance has its weight if the weights of
that guider's formula sum to one, as those of CFG, APG and skip-layer guidance do; CFG-Zero* and tangential CFG change
it by a few percent. Where cond and uncond samples come in one list, the weak pass predicts them all.

Written by `python -m tests.pipeline_table`.

| pipeline | denoiser | its calls | tested |
| --- | --- | --- | --- |
{chr(10).join(rows)}

## What else to know

{chr(10).join(f"- {names}: {what}" for names, what in NOTES.items())}

## Why some are refused

{chr(10).join(f"- {names}: {why}" for names, why in REFUSED.items())}

## Not read

These need packages that were not installed when this page was written: {", ".join(unread) or "none"}.
"""


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(document(rows(), not_read()), encoding="utf-8")
