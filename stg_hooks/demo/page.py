"""Show what the demo made: a page that needs no network, animations, and a table of accuracies."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

from PIL import Image

from stg_hooks.study.report.page import part

if TYPE_CHECKING:
    from torch import Tensor

    from stg_hooks.demo.__main__ import Clip, Settings

ZOOM = 6
FRAME_MS = 160
MEASURES = {"colour": "Colour", "shape": "Shape", "motion": "Motion", "all": "All three"}
WAYS = ("CFG", "CFG + STG")


def animations(clips: Sequence[Clip]) -> dict[str, bytes]:
    """Make the files that lie beside the page.

    Args:
        clips: what was sampled.

    Returns:
        GIFs by name: two per clip, and one with up to eight clips, plain above guided.
    """
    files = {"comparison.gif": _gif([_compare(clips[:8], index) for index in range(len(clips[0].plain))])}
    for position, clip in enumerate(clips, 1):
        for way, video in (("cfg", clip.plain), ("stg", clip.guided)):
            name = f"clips/{position:02d}-{clip.prompt.replace(' ', '-')}-{way}.gif"
            files[name] = _gif([_zoomed(Image.fromarray(frame.numpy())) for frame in video])
    return files


def snippet(clip: Clip, settings: Settings) -> str:
    """Write the code that makes one clip both ways."""
    mode = "" if settings.mode == "residual" else f', mode="{settings.mode}"'
    return f"""\
import torch

import stg_hooks as stg
from stg_hooks import demo

pipe = demo.load()  # a stock diffusers.WanPipeline
inputs = demo.inputs(["{clip.prompt}"]) | {{"num_inference_steps": {settings.steps}}}


def sample():
    seed = torch.Generator().manual_seed({clip.seed})
    return pipe(**inputs, guidance_scale={settings.guidance_scale:g}, generator=seed).frames


plain = demo.to_video(sample())
with stg.apply(pipe, layers={list(settings.layers)}, scale={settings.scale:g}{mode}):
    guided = demo.to_video(sample())
"""


def summary(clips: Sequence[Clip], report: dict[str, Any] | None) -> list[list[str]]:
    """Tabulate the accuracies of this run beside those of the full evaluation.

    Args:
        clips: what was sampled.
        report: the full evaluation, if there is one.

    Returns:
        Rows of cells, the header first.
    """
    rows = [["right", *(f"{way}, this run" for way in WAYS)]]
    for measure, title in MEASURES.items():
        counts = (
            sum(_right(clip, clip.plain_seen)[measure] for clip in clips),
            sum(_right(clip, clip.guided_seen)[measure] for clip in clips),
        )
        rows.append([title, *(f"{count} of {len(clips)}" for count in counts)])
    for role, way in zip(("plain", "guided"), WAYS, strict=True):
        row = _row(report, role)
        if report is not None and row is not None:
            rows[0].append(f"{way}, evaluation")
            for cells, measure in zip(rows[1:], MEASURES, strict=True):
                cells.append(f"{row[measure][0]:.1%}")
    return rows


def verdict(report: dict[str, Any] | None, settings: Settings) -> str:
    """Say what the full evaluation shows, be it good or bad.

    Args:
        report: the full evaluation, if there is one.
        settings: those of this run.

    Returns:
        A few sentences.
    """
    row = _row(report, "guided")
    if report is None or row is None:
        return (
            "No full evaluation ships with these weights. So few clips show what the two ways do, not which is better."
        )
    better: list[str] = []
    worse: list[str] = []
    unclear: list[str] = []
    for measure, title in [*MEASURES.items(), ("frechet_distance", "Fréchet distance")]:
        change, low, high = row["against_plain"][measure]
        distance = measure == "frechet_distance"
        name = "all three together" if measure == "all" else title if distance else title.lower()
        text = f"{name} ({change:+.2f})" if distance else f"{name} ({100 * change:+.1f} points)"
        if low <= 0 <= high:
            unclear.append(text)
        else:
            (better if (change < 0) == distance else worse).append(text)
    said = [
        f"{word}: {', '.join(names)}."
        for word, names in (("Better", better), ("Worse", worse), ("No difference beyond chance", unclear))
        if names
    ]
    start = f"Evaluation, {report['clips']:,} clips per way: STG against CFG alone at equal steps, 95 % confidence."
    other = {**dataclasses.asdict(settings), "layers": list(settings.layers)} != report["settings"]
    end = " This run used other settings than that evaluation." if other else ""
    return f"{start} {' '.join(said)}{end}"


def render(clips: Sequence[Clip], settings: Settings, report: dict[str, Any] | None) -> str:
    """Write the page.

    Args:
        clips: what was sampled.
        settings: how.
        report: the full evaluation, if there is one.

    Returns:
        HTML that loads nothing from anywhere.
    """
    off = "" if settings.guidance_scale > 1 else " (off)"
    facts = {
        "Model": "8 layers, one million weights",
        "Steps": f"{settings.steps}",
        "CFG scale, both sides": f"{settings.guidance_scale:g}{off}",
        "Layers that STG skips": ", ".join(map(str, settings.layers)),
        "STG scale": f"{settings.scale:g}",
        "Mode": settings.mode,
    }
    differing = sum(clip.plain_seen != clip.guided_seen for clip in clips)
    return Template(_PAGE).substitute(
        base=part("base.css"),
        copy=part("copy.js"),
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()),
        table=_table(summary(clips, report)),
        verdict=escape(verdict(report, settings)),
        evaluation=_evaluation(report),
        count=len(clips),
        differing=differing,
        unanimous="" if differing else "hidden",
        cards="\n".join(map(_card, clips)),
        code=escape(snippet(clips[0], settings)),
        prompt=escape(clips[0].prompt),
    )


def _row(report: dict[str, Any] | None, role: str) -> dict[str, Any] | None:
    """Find a row of the evaluation by what it is for."""
    return next((row for row in (report or {"rows": []})["rows"] if row["role"] == role), None)


def _right(clip: Clip, seen: Sequence[str]) -> dict[str, bool]:
    """Tell which words of the prompt the judge saw."""
    single = [word == wanted for word, wanted in zip(seen, clip.prompt.split(), strict=True)]
    return dict(zip(MEASURES, [*single, all(single)], strict=True))


def _image(frames: Tensor) -> Image.Image:
    """Lay frames side by side.

    Args:
        frames: (F, H, W, 3), uint8.

    Returns:
        An image of H x (F W) pixels.
    """
    return Image.fromarray(frames.permute(1, 0, 2, 3).flatten(1, 2).numpy())


def _zoomed(image: Image.Image, zoom: int = ZOOM) -> Image.Image:
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def _gif(frames: Sequence[Image.Image]) -> bytes:
    """Encode an endless animation that rests on its last frame."""
    durations = [FRAME_MS] * (len(frames) - 1) + [3 * FRAME_MS]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return file.getvalue()


def _compare(clips: Sequence[Clip], index: int) -> Image.Image:
    """Draw one frame of several clips: plain ones in the upper row, guided ones below."""
    size = clips[0].plain.shape[1]
    gap = 2
    sheet = Image.new("RGB", (len(clips) * (size + gap) - gap, 2 * size + gap), (255, 255, 255))
    for column, clip in enumerate(clips):
        for row, video in enumerate((clip.plain, clip.guided)):
            sheet.paste(Image.fromarray(video[index].numpy()), (column * (size + gap), row * (size + gap)))
    return _zoomed(sheet, 4)


def _card(clip: Clip) -> str:
    """Show one clip both ways, with what the judge sees."""
    sides = "".join(
        _side(clip, way, video, seen)
        for way, video, seen in zip(WAYS, (clip.plain, clip.guided), (clip.plain_seen, clip.guided_seen), strict=True)
    )
    kind = "same" if clip.plain_seen == clip.guided_seen else "differs"
    title = f"<h3>{escape(clip.prompt)} <small>seed {clip.seed}</small></h3>"
    return f'<article class="{kind}">{title}<div class="pair">{sides}</div></article>'


def _side(clip: Clip, way: str, video: Tensor, seen: Sequence[str]) -> str:
    """Show one clip: the film strip that the page plays, and the judge's word on each word of the prompt."""
    strip = io.BytesIO()
    _image(video).save(strip, "PNG", optimize=True)
    data = base64.b64encode(strip.getvalue()).decode()
    words = []
    for word, wanted in zip(seen, clip.prompt.split(), strict=True):
        if word == wanted:
            words.append(f'<li class="ok"><b>✓</b> {escape(wanted)}</li>')
        else:
            words.append(f'<li class="no"><b>✗</b> <s>{escape(wanted)}</s> {escape(word)}</li>')
    label = f"{escape(clip.prompt)}, {way}"
    film = f'<div class="film" role="img" aria-label="{label}" style="--s:url(data:image/png;base64,{data})"></div>'
    return f"<figure><figcaption>{way}</figcaption>{film}<ul>{''.join(words)}</ul></figure>"


def _table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Write a table whose first row and first column are headers."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows[1:]
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _evaluation(report: dict[str, Any] | None) -> str:
    """Show every row of the full evaluation."""
    if report is None:
        return ""
    rows = [["", *MEASURES.values(), "Fréchet distance", "Compute"]]
    for row in report["rows"]:
        cells = [f"{row[m][0]:.1%} ({100 * row[m][1]:.1f}–{100 * row[m][2]:.1f})" for m in MEASURES]
        compute = "" if row["compute"] is None else f"{row['compute']:.2f}"
        rows.append([row["name"], *cells, f"{row['frechet_distance']:.2f}", compute])
    note = (
        f"{report['clips']:,} clips per row, the same noise and conditions in every row, none of which served to "
        "choose the setting; 95 % intervals in brackets. Fréchet distance (lower is better) is between the judge's "
        f"features and those of {report['real_clips']:,} real clips; the row of real clips is the floor for so many. "
        "Compute counts floating-point operations, CFG at equal steps being 1."
    )
    return f"<h2>The full evaluation</h2><p>{escape(note)}</p>{_table(rows, 'wide')}"


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>stg_hooks: with and without skip guidance</title>
<style>
$base
:root { --frames: running }
.wide th:first-child { min-width: 13rem }
.wide th, .wide td { padding: .35rem .55rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem }
article { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .7rem .8rem .8rem }
.only article.same { display: none }
h3 { font-size: 1rem; margin: 0 0 .4rem; display: flex; justify-content: space-between; gap: .5rem }
h3 small { font-weight: 400; font-size: .82rem; white-space: nowrap }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .7rem }
figure { margin: 0; min-width: 0 }
figcaption { font-size: .82rem; color: var(--soft); margin-bottom: .2rem }
.film { aspect-ratio: 1; border-radius: .35rem; outline: 1px solid var(--line);
  background: var(--s) 0 0 / 600% 100%; image-rendering: pixelated;
  animation: play 1.28s step-end infinite; animation-play-state: var(--frames) }
@keyframes play {
  0% { background-position-x: 0 } 12.5% { background-position-x: 20% } 25% { background-position-x: 40% }
  37.5% { background-position-x: 60% } 50% { background-position-x: 80% } 62.5%, 100% { background-position-x: 100% }
}
figure ul { list-style: none; margin: .4rem 0 0; padding: 0; font-size: .86rem; line-height: 1.35 }
.ok b { color: var(--ok) }
.no, .no b { color: var(--no) }
</style>
</head>
<body>
<main>
<h1>The same noise, with and without skip guidance</h1>
<p>A small video model draws what three words ask for. Both sides of a pair use the same weights, prompt, seed and
number of steps, in an unmodified diffusers pipeline. The left side has classifier-free guidance (CFG) alone. On the
right, <code>stg.apply</code> adds spatiotemporal skip guidance (STG).</p>
<dl>$facts</dl>

<h2>How often the clips show what was asked for</h2>
$table
<p>$verdict</p>
<p class="soft">The judge is a small classifier that was trained on real clips.</p>

<h2>$count clips, both ways</h2>
<div class="bar" hidden>
<button type="button" id="play">Pause</button>
<label $unanimous><input type="checkbox" id="only"> only the $differing where the judge sees a difference</label>
</div>
<p class="soft">Under each clip, the judge's view of each word. In red what was asked for, struck out, and what it sees
instead.</p>
<div class="grid">
$cards
</div>

<h2>The code for “$prompt”</h2>
<pre id="code">$code</pre>
<button type="button" id="copy" hidden>Copy</button>
$evaluation
<p class="soft">Method: Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling, arXiv 2411.18664.</p>
</main>
<script>
$copy
const id = (name) => document.getElementById(name);
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
let playing = true;
const play = (on) => {
  playing = on;
  document.documentElement.style.setProperty("--frames", on ? "running" : "paused");
  id("play").textContent = on ? "Pause" : "Play";
};
document.querySelector(".bar").hidden = false;
id("copy").hidden = false;
id("play").onclick = () => play(!playing);
if (still) play(false);
id("only").onchange = (event) => document.querySelector(".grid").classList.toggle("only", event.target.checked);
copyOnClick(id("copy"), id("code"));
</script>
</body>
</html>
"""
