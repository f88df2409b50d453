"""Show what the demo made: a page that needs no network, animations, and a table of accuracies."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from stg_hooks.demo import judge, labels
from stg_hooks.demo.clips import COLOURS
from stg_hooks.study.report.page import part

if TYPE_CHECKING:
    from torch import Tensor

    from stg_hooks.demo.__main__ import Clip, Settings

ZOOM = 6
STRIP_ZOOM = 4  # the page magnifies the rest
FRAME_MS = 160
HEADLINE = next(iter(judge.MEASURES))
TITLES = judge.MEASURES | {
    "frechet_distance": "Fréchet distance to real clips",
    "grain": "noise of the background, of 255",
}


def animations(clips: Sequence[Clip], settings: Settings) -> dict[str, bytes]:
    """Make the files that lie beside the page.

    Args:
        clips: what was sampled.
        settings: how.

    Returns:
        GIFs by name: two per clip, and one with up to eight clips, plain above guided.
    """
    frames = range(len(clips[0].plain))
    files = {"comparison.gif": _gif([_compare(clips[:8], settings.ways, index) for index in frames])}
    for position, clip in enumerate(clips, 1):
        for way, video in (("plain", clip.plain), ("stg", clip.guided)):
            name = f"clips/{position:02d}-{clip.prompt.replace(' ', '-')}-{way}.gif"
            files[name] = _gif([_zoomed(frame) for frame in video])
    return files


def snippet(clip: Clip, settings: Settings) -> str:
    """Write the code that makes one clip both ways."""
    mode = "" if settings.mode == "residual" else f', mode="{settings.mode}"'
    return f"""\
import torch

import stg_hooks as stg
from stg_hooks import demo

pipe = demo.load()  # a stock diffusers.WanPipeline
inputs = demo.inputs(["{clip.prompt}"])


def sample():
    seed = torch.Generator().manual_seed({clip.seed})
    call = inputs | {{"num_inference_steps": {settings.steps}, "guidance_scale": {settings.guidance_scale:g}}}
    return pipe(**call, generator=seed).frames


plain = demo.to_video(sample())
with stg.apply(pipe, layers={list(settings.layers)}, scale={settings.scale:g}{mode}):
    guided = demo.to_video(sample())
"""


def summary(clips: Sequence[Clip], settings: Settings, report: dict[str, Any] | None) -> list[list[str]]:
    """Tabulate this run beside the full evaluation.

    Args:
        clips: what was sampled.
        settings: how.
        report: the full evaluation, if there is one.

    Returns:
        Rows of cells, the header first.
    """
    rows = [["clips with", *settings.ways]]
    counts = [[_grade(clip, seen) for clip, seen in _sides(clips, guided)] for guided in (False, True)]
    plain, guided = _row(report, "plain"), _row(report, "guided")
    for measure, title in judge.MEASURES.items():
        cells = [f"{sum(one[measure] for one in way)} of {len(clips)}" for way in counts]
        if report is not None and plain and guided:
            number = f"of {report['clips']:,}"
            cells = [
                f"{cell}; {row[measure][0]:.1%} {number}" for cell, row in zip(cells, (plain, guided), strict=True)
            ]
        rows.append([title, *cells])
    return rows


def headline(report: dict[str, Any] | None) -> tuple[str, str]:
    """Give the decisive numbers of the full evaluation.

    Args:
        report: the full evaluation, if there is one.

    Returns:
        The numbers, and what they mean.
    """
    plain, guided, more, cfg = (_row(report, role) for role in ("plain", "guided", "more", "cfg"))
    if report is None or plain is None or guided is None:
        return (
            "Not measured",
            "No full evaluation ships with these weights. So few clips show what the two ways do, not which is better.",
        )
    change, low, high = (100 * value for value in guided["against_plain"][HEADLINE])
    said = (
        f"of {report['clips']:,} clips have {TITLES[HEADLINE]}: {change:+.1f} points (95 %: {low:+.1f} to {high:+.1f}) "
        f"for {guided['compute']:.2f} times the compute."
    )
    if more:
        said += f" More steps for {more['compute']:.2f} times the compute instead: {more[HEADLINE][0]:.1%}."
    if cfg:
        said += (
            f" {cfg['name']}, for {cfg['compute']:.2f} times the compute: {cfg[HEADLINE][0]:.1%}, but a Fréchet "
            f"distance to real clips of {cfg['frechet_distance']:.1f}; STG: {guided['frechet_distance']:.1f}."
        )
    return f"{plain[HEADLINE][0]:.1%} → {guided[HEADLINE][0]:.1%}", said


def verdict(report: dict[str, Any] | None, settings: Settings) -> str:
    """Say all that the full evaluation shows, be it good or bad.

    Args:
        report: the full evaluation, if there is one.
        settings: those of this run.

    Returns:
        A few sentences.
    """
    row = _row(report, "guided")
    if report is None or row is None:
        return ""
    better: list[str] = []
    worse: list[str] = []
    unclear: list[str] = []
    for measure in (*judge.MEASURES, "frechet_distance", "grain"):
        change, low, high = row["against_plain"][measure]
        rate = measure in judge.MEASURES
        text = f"{TITLES[measure]} ({100 * change:+.1f} points)" if rate else f"{TITLES[measure]} ({change:+.2f})"
        if low <= 0 <= high:
            unclear.append(text)
        else:
            (better if (change > 0) == rate else worse).append(text)
    kinds = (("Better", better), ("Worse", worse), ("No difference beyond chance", unclear))
    words = [f"{word}: {', '.join(names)}." for word, names in kinds if names]
    other = {**dataclasses.asdict(settings), "layers": list(settings.layers)} != report["settings"]
    return " ".join(words + ["This run used other settings than that evaluation."] * other)


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
        "Steps": f"{settings.steps}",
        "CFG scale, both sides": f"{settings.guidance_scale:g}{off}",
        "Layers that STG skips": ", ".join(map(str, settings.layers)),
        "STG scale": f"{settings.scale:g}",
        "Mode": settings.mode,
    }
    better, worse = (
        sum(
            _grade(clip, clip.guided_seen)[HEADLINE] - _grade(clip, clip.plain_seen)[HEADLINE] == sign for clip in clips
        )
        for sign in (1, -1)
    )
    numbers, said = headline(report)
    return Template(_PAGE).substitute(
        base=part("base.css"),
        copy=part("copy.js"),
        hint=part("hint.js"),
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()),
        plain=escape(settings.ways[0]),
        guided=escape(settings.ways[1]),
        numbers=escape(numbers),
        said=escape(said),
        table=_table(summary(clips, settings, report)),
        verdict=escape(verdict(report, settings)),
        evaluation=_evaluation(report),
        count=len(clips),
        better=better,
        worse=worse,
        cards="\n".join(_card(clip, settings.ways) for clip in clips),
        code=escape(snippet(clips[0], settings)),
        prompt=escape(clips[0].prompt),
    )


def _row(report: dict[str, Any] | None, role: str) -> dict[str, Any] | None:
    """Find a row of the evaluation by what it is for."""
    return next((row for row in (report or {"rows": []})["rows"] if row["role"] == role), None)


def _sides(clips: Sequence[Clip], guided: bool) -> list[tuple[Clip, Tensor]]:
    """Pair clips with what the judge reads on one side."""
    return [(clip, clip.guided_seen if guided else clip.plain_seen) for clip in clips]


def _grade(clip: Clip, seen: Tensor) -> dict[str, bool]:
    """Tell what is right about one side of a clip."""
    return {name: bool(hit) for name, hit in judge.grade(seen[None], labels([clip.prompt])).items()}


def _zoomed(frame: Tensor, zoom: int = ZOOM) -> Image.Image:
    """Magnify a frame, (H, W, 3), smoothly: squares as large as these would hide what a digit is."""
    image = Image.fromarray(frame.numpy())
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC)


def _gif(frames: Sequence[Image.Image]) -> bytes:
    """Encode an endless animation that rests on its last frame."""
    durations = [FRAME_MS] * (len(frames) - 1) + [3 * FRAME_MS]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return file.getvalue()


def _compare(clips: Sequence[Clip], ways: Sequence[str], index: int) -> Image.Image:
    """Draw one frame of several clips: plain ones in the upper row, guided ones below, with their names."""
    size, gap, head = ZOOM * clips[0].plain.shape[1], 8, 22
    sheet = Image.new("RGB", (len(clips) * (size + gap) + gap, 2 * (head + size) + 3 * gap), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, way in enumerate(ways):
        top = gap + row * (head + size + gap)
        draw.text((gap, top), way, (20, 20, 20), font)
        for column, clip in enumerate(clips):
            frame = (clip.guided if row else clip.plain)[index]
            left = gap + column * (size + gap)
            sheet.paste(_zoomed(frame), (left, top + head))
            if column:
                draw.text((left, top), clip.prompt, (120, 120, 120), ImageFont.load_default(11))
    return sheet


def _card(clip: Clip, ways: Sequence[str]) -> str:
    """Show one clip both ways, with what the judge reads."""
    sides = "".join(
        _side(clip, way, video, seen)
        for way, video, seen in zip(ways, (clip.plain, clip.guided), (clip.plain_seen, clip.guided_seen), strict=True)
    )
    plain, guided = (_grade(clip, seen)[HEADLINE] for seen in (clip.plain_seen, clip.guided_seen))
    kind = "same" if plain == guided else "differs"
    title = f"<h3>{escape(clip.prompt)} <small>seed {clip.seed}</small></h3>"
    return f'<article class="{kind}">{title}<div class="pair">{sides}</div></article>'


def _side(clip: Clip, way: str, video: Tensor, seen: Tensor) -> str:
    """Show one clip: the film strip that the page plays, and what the judge reads of each digit, frame by frame."""
    frames = [_zoomed(frame, STRIP_ZOOM) for frame in video]
    strip, file = Image.new("RGB", (len(frames) * frames[0].width, frames[0].height)), io.BytesIO()
    for index, frame in enumerate(frames):
        strip.paste(frame, (index * frame.width, 0))
    strip.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    words = []
    for colour, wanted, read in zip(COLOURS, labels([clip.prompt])[0].tolist(), seen.T.tolist(), strict=True):
        digits = " ".join(str(digit) if digit == wanted else f"<b>{digit}</b>" for digit in read)
        kind, mark = ("ok", "✓") if set(read) == {wanted} else ("no", "✗")
        words.append(f'<li class="{kind}"><b>{mark}</b> {colour} {digits}</li>')
    label = f"{escape(clip.prompt)}, {escape(way)}"
    film = f'<div class="film" role="img" aria-label="{label}" style="--s:url(data:image/png;base64,{data})"></div>'
    return f"<figure><figcaption>{escape(way)}</figcaption>{film}<ul>{''.join(words)}</ul></figure>"


def _table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Write a table whose first row and first column are headers."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows[1:]
    )
    return (
        '<p class="soft hint" hidden>Scroll the table sideways for more columns →</p><div class="scroll" tabindex="0">'
        f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _evaluation(report: dict[str, Any] | None) -> str:
    """Show every row of the full evaluation, the decisive columns first: a phone shows those without scrolling."""
    if report is None:
        return ""
    rows = [["", "Right", "Fréchet distance", "Grain", "Compute", "Same in every frame"]]
    for row in report["rows"]:
        right, kept = (f"{row[m][0]:.1%} ({100 * row[m][1]:.1f}–{100 * row[m][2]:.1f})" for m in judge.MEASURES)
        compute = "" if row["compute"] is None else f"{row['compute']:.2f}"
        rows.append([row["name"], right, f"{row['frechet_distance']:.2f}", f"{row['grain']:.1f}", compute, kept])
    note = (
        f"{report['clips']:,} clips per row, the same noise and conditions in every row, none of which served to "
        "choose the setting; 95 % intervals in brackets. Right: the judge reads both digits as asked for in every "
        "frame. Fréchet distance (lower is better) is between the judge's "
        f"features and those of {report['real_clips']:,} real clips; the row of real clips is the floor for so many. "
        "Grain: noise of the background, of 255. Compute counts floating-point operations, the first row being 1."
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
.wide th, .wide td { padding: .35rem .55rem }
.wide th:first-child { min-width: 7rem; position: sticky; left: 0; background: var(--bg) }
@media (max-width: 40rem) {
  .wide { font-size: .82rem }
  .wide :is(th, td) { padding: .3rem .35rem }
  .wide td:nth-child(2) { max-width: 4.6rem }
  .wide thead th { font-size: .75rem }
}
.number { font-size: 1.9rem; font-weight: 650; line-height: 1.2; margin: .6rem 0 0 }
td { white-space: normal }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem }
article { background: var(--card); border: 1px solid var(--line); border-radius: .7rem; padding: .7rem .8rem .8rem }
.only article.same { display: none }
h3 { font-size: 1rem; margin: 0 0 .4rem; display: flex; justify-content: space-between; gap: .5rem }
h3 small { font-weight: 400; font-size: .82rem; white-space: nowrap }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .7rem }
figure { margin: 0; min-width: 0 }
figcaption { font-size: .82rem; color: var(--soft); margin-bottom: .2rem }
.film { aspect-ratio: 1; border-radius: .35rem; outline: 1px solid var(--line);
  background: var(--s) 0 0 / 600% 100%;
  animation: play 1.28s step-end infinite; animation-play-state: var(--frames) }
@keyframes play {
  0% { background-position-x: 0 } 12.5% { background-position-x: 20% } 25% { background-position-x: 40% }
  37.5% { background-position-x: 60% } 50% { background-position-x: 80% } 62.5%, 100% { background-position-x: 100% }
}
figure ul { list-style: none; margin: .4rem 0 0; padding: 0; font-size: .86rem; line-height: 1.35 }
.ok b { color: var(--ok) }
.no b { color: var(--no) }
</style>
</head>
<body>
<main>
<h1>The same noise, with and without skip guidance</h1>
<p class="number">$numbers</p>
<p>$said</p>
<section>
<div class="bar" hidden>
<button type="button" id="play">Pause</button>
<label><input type="checkbox" id="only"> only where the judge's verdict differs ($better better, $worse worse)</label>
</div>
<div class="grid">
$cards
</div>
</section>
<p class="soft">$count clips, not selected. Left: $plain; right: $guided. Both sides of a pair have the same weights,
prompt, seed and number of steps, in an unmodified diffusers pipeline; on the right, <code>stg.apply</code> adds
spatiotemporal skip guidance (STG). Under each clip: what the judge, a small classifier that was trained on real clips,
reads in each frame.</p>
<dl>$facts</dl>

<h2>This run, and the full evaluation</h2>
$table
<p>$verdict</p>

<h2>The code for “$prompt”</h2>
<pre id="code">$code</pre>
<button type="button" id="copy" hidden>Copy</button>
$evaluation
<p class="soft">Method: Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling, arXiv 2411.18664.</p>
</main>
<script>
$copy
$hint
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
for (const box of document.querySelectorAll(".scroll")) hintAtOverflow(box, box.previousElementSibling);
</script>
</body>
</html>
"""
