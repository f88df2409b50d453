"""The demo: its model is run by a stock pipeline, and its page needs nothing but itself."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="the demo extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the demo extra is not installed")
pytest.importorskip("tqdm", reason="the demo extra is not installed")

import stg_hooks as stg  # noqa: E402
from stg_hooks import demo  # noqa: E402
from stg_hooks.demo import __main__ as program  # noqa: E402
from stg_hooks.demo import clips, judge, page  # noqa: E402
from stg_hooks.demo.__main__ import Clip, Settings  # noqa: E402

WEIGHTS = Path(demo.__file__).parent / "weights"
TINY = ["--clips", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return demo.load()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert program.main([*TINY, "--layers", "6", "--scale", "1", "--out", str(out)]) == 0
    return out


def pretend_evaluation(change: float, low: float, high: float) -> dict[str, Any]:
    """Make a report in which every measure of the guided row differs from the plain one by this much."""
    against = {measure: [change, low, high] for measure in (*judge.MEASURES, "frechet_distance", "grain")}
    numbers = {"frechet_distance": 3.0, "grain": 2.0, "compute": 1.0}
    row = {measure: [0.75, 0.7, 0.8] for measure in judge.MEASURES} | numbers
    return {
        "clips": 1024,
        "real_clips": 2000,
        "settings": dataclasses.asdict(Settings()) | {"layers": list(Settings().layers)},
        "rows": [
            row | {"name": "no CFG", "role": "plain", "against_plain": None},
            row | {"name": "no CFG + STG", "role": "guided", "against_plain": against},
            row | {"name": "more steps", "role": "more", "against_plain": against},
            row | {"name": "real clips", "role": "real", "compute": None},
        ],
    }


# --- the model --------------------------------------------------------------------------------------------------------


def test_everything_loaded_is_stock(pipe: Any) -> None:
    assert type(pipe) is diffusers.WanPipeline
    assert type(pipe.transformer) is diffusers.WanTransformer3DModel
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert not pipe.transformer.training
    assert len(list(stg.layers(pipe))) >= 8


def test_colours_may_come_in_any_order() -> None:
    assert demo.labels(["red 3 blue 7"]).tolist() == demo.labels(["blue 7, RED 3"]).tolist() == [[3, 7]]
    torch.testing.assert_close(
        demo.inputs(["blue 7 red 3"])["prompt_embeds"], demo.inputs(torch.tensor([[3, 7]]))["prompt_embeds"]
    )


@pytest.mark.parametrize(
    ("prompts", "error", "text"),
    [
        (["red 3"], ValueError, "'red 3' cannot be drawn.*for example \"red 3 blue 7\""),
        (["red 3 blue 12"], ValueError, "cannot be drawn"),
        (["red 3 green 7"], ValueError, "cannot be drawn"),
        (["red 3 red 7"], ValueError, "cannot be drawn"),
        (["red 3 blue 7 red 3"], ValueError, "cannot be drawn"),
        (["3 7"], ValueError, "cannot be drawn"),
        ([], ValueError, "prompts is empty"),
        ("red 3 blue 7", TypeError, r"write \['red 3 blue 7'\]"),
        (torch.tensor([[3, 10]]), ValueError, "digits from 0 to 9"),
        (torch.tensor([[3, 7, 1]]), ValueError, r"they need \(B, 2\)"),
    ],
)
def test_inputs_refuses_what_it_cannot_draw(prompts: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        demo.inputs(prompts)


def test_every_condition_comes_once_before_any_comes_twice() -> None:
    assert len({tuple(row) for row in demo.labels(program.conditions(100)).tolist()}) == 100
    assert program.conditions(200)[100:] == program.conditions(100)


# --- the judge --------------------------------------------------------------------------------------------------------


def test_the_judge_reads_real_clips_of_images_that_it_was_not_trained_on() -> None:
    pytest.importorskip("sklearn", reason="real clips are drawn with the digits of scikit-learn")
    from benchmarks.demo_model import digits

    video, labels = digits.draw(200, torch.Generator().manual_seed(5), held_out=True)
    seen, features = judge.look(video, judge.load())
    right = judge.grade(seen, labels)["right"].double().mean()
    assert right > 0.85
    assert judge.grade(seen, labels.roll(1, 0))["right"].double().mean() < 0.1
    assert features.shape == (200, 2 * judge.WIDTH)
    assert judge.grain(video).max() < 2  # faint ink


def test_a_clip_is_right_when_every_frame_is() -> None:
    seen = torch.tensor([[[3, 7]] * 6, [[3, 7]] * 5 + [[3, 1]], [[3, 1]] * 6])
    graded = judge.grade(seen, torch.tensor([[3, 7]] * 3))
    assert graded["right"].tolist() == [True, False, False]
    assert graded["kept"].tolist() == [True, False, True]


def test_grain_is_the_noise_of_the_background() -> None:
    video = torch.full((2, 3, 6, 16, 16), clips.BACKGROUND)
    video[1] += (2 / 127.5) * torch.tensor([1.0, -1.0]).repeat(8)
    video[:, :, :, :4] = 1.0  # not background
    torch.testing.assert_close(judge.grain(video), torch.tensor([0.0, 2.0]), atol=1e-4, rtol=0)


def test_folding_is_undone_by_unfolding() -> None:
    video = torch.randn(2, 3, 6, 16, 16)
    torch.testing.assert_close(clips.unfold(clips.fold(video)), video)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_guidance_changes_the_clips_and_only_inside_its_with() -> None:
    guided = program.run(Settings(layers=(6,), scale=1.0, steps=2), 2, seed=0)
    off = program.run(Settings(layers=(6,), scale=0.0, steps=2), 2, seed=0)
    for clip, plain in zip(guided, off, strict=True):
        assert torch.equal(plain.plain, plain.guided)  # scale 0 is off
        assert torch.equal(clip.plain, plain.plain)
        assert not torch.equal(clip.plain, clip.guided)


def test_clips_depend_on_the_seed() -> None:
    first, second = (program.run(Settings(steps=1), 1, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(first.plain, second.plain)


def test_the_code_on_the_page_makes_the_clip_on_the_page() -> None:
    settings = Settings(layers=(5, 6), scale=0.75, steps=2)
    clip = program.run(settings, 1, seed=3)[0]
    scope: dict[str, Any] = {}
    exec(page.snippet(clip, settings), scope)
    for name in ("plain", "guided"):  # the demo uses one thread and the snippet all: rounding may differ
        torch.testing.assert_close(scope[name][0].int(), getattr(clip, name).int(), atol=1, rtol=0)
    assert (clip.plain.int() - clip.guided.int()).abs().max() > 1


# --- the files --------------------------------------------------------------------------------------------------------


def loads_from_elsewhere(html: str) -> list[str]:
    """Find everything that a browser would fetch: addresses in attributes and styles that are not data."""
    found = re.findall(r"""(?:src|href|action|poster|data)\s*=\s*["']?([^"'\s>]+)|url\(\s*["']?([^"')]+)""", html)
    addresses = [first or second for first, second in found]
    addresses += re.findall(r"@import[^;]+|https?://[^\s\"'<)]+", html)
    return [address for address in addresses if not address.startswith("data:")]


def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    html = (written / "index.html").read_text(encoding="utf-8")
    assert loads_from_elsewhere(html) == []
    assert "default-src 'none'" in html
    assert html.count('class="film"') == 4
    assert html.count("data:image/png;base64,") == 4
    assert "layers=[6], scale=1)" in html
    assert not re.search(r"\$[a-z]", html), "a placeholder was left"


@pytest.mark.parametrize(
    "html",
    [
        '<img src="a.png">',
        "<style>@import 'a.css';</style>",
        "<i style='background: url(a.png)'>",
        "fetch('https://a.example')",
    ],
)
def test_the_check_for_foreign_addresses_can_fail(html: str) -> None:
    assert loads_from_elsewhere(html)


def test_animations_lie_beside_the_page(written: Path) -> None:
    names = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    assert names == [
        "clips/01-red-3-blue-7-plain.gif",
        "clips/01-red-3-blue-7-stg.gif",
        "clips/02-red-6-blue-4-plain.gif",
        "clips/02-red-6-blue-4-stg.gif",
        "comparison.gif",
        "index.html",
    ]
    for name in names[:-1]:
        with Image.open(written / name) as image:
            assert image.is_animated
            assert image.info["loop"] == 0
    with Image.open(written / names[0]) as image:
        assert image.n_frames == clips.FRAMES
        assert image.size == (page.ZOOM * clips.SIZE, page.ZOOM * clips.SIZE)


def test_gif_shows_the_frames_of_the_clip() -> None:
    video = torch.full((clips.FRAMES, clips.SIZE, clips.SIZE, 3), 19, dtype=torch.uint8)
    for index, frame in enumerate(video):
        frame[2:9, index : index + 5] = torch.tensor([240, 100, 70])
    seen = torch.tensor([[3, 7]] * clips.FRAMES)
    clip = Clip("red 3 blue 7", 0, video, video, seen, seen)
    data = page.animations([clip], Settings())["clips/01-red-3-blue-7-plain.gif"]
    with Image.open(io.BytesIO(data)) as image:
        for index, frame in enumerate(video):
            image.seek(index)
            shown = Image.fromarray(frame.numpy()).resize(image.size, Image.Resampling.BICUBIC)
            seen, wanted = (
                torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in (image.convert("RGB"), shown)
            )
            assert (seen.float() - wanted.float()).abs().mean() < 4  # 256 colours at most


# --- what it says -----------------------------------------------------------------------------------------------------


def test_verdict_reports_what_stg_makes_worse() -> None:
    for change, low, high, rates, distance in [
        (
            0.1,
            0.05,
            0.15,
            "Better: both digits right in every frame (+10.0 points)",
            "Worse: Fréchet distance to real clips (+0.10)",
        ),
        (
            -0.1,
            -0.15,
            -0.05,
            "Worse: both digits right in every frame (-10.0 points)",
            "Better: Fréchet distance to real clips (-0.10)",
        ),
        (
            0.1,
            -0.05,
            0.25,
            "No difference beyond chance: both digits right in every frame (+10.0 points)",
            "real clips (+0.10)",
        ),
    ]:
        text = page.verdict(pretend_evaluation(change, low, high), Settings())
        assert rates in text
        assert distance in text
        assert "other settings" not in text
    assert "other settings" in page.verdict(pretend_evaluation(0, 0, 0), Settings(scale=0.123))


def test_without_an_evaluation_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "evaluation", lambda: None)
    assert program.main([*TINY, "--steps", "1", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "No full evaluation" in shown
    assert "2 of 2" in shown or "1 of 2" in shown or "0 of 2" in shown
    assert "The full evaluation" not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_with_an_evaluation_the_page_shows_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "evaluation", lambda: pretend_evaluation(0.1, 0.05, 0.15))
    assert program.main([*TINY, "--steps", "1", "--out", str(tmp_path)]) == 0
    assert "75.0%" in capsys.readouterr().out
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "real clips" in html
    assert "75.0% (70.0–80.0)" in html
    heads = re.findall(r'<th scope="col">(.*?)</th>', html.partition("The full evaluation</h2>")[2])
    assert heads[1:3] == ["Right", "Fréchet distance"]  # a phone shows these without scrolling
    clips_section, tables = html.partition('class="grid"')[2].split("</section>")
    assert "</article>" in clips_section  # what sticks while it is on the screen
    assert "<article" not in tables
    assert "<table" in tables


def test_the_shipped_evaluation_belongs_to_the_shipped_weights() -> None:
    report = program.evaluation()
    if report is None:
        pytest.skip("no evaluation ships yet")
    files = ("config.json", "judge.safetensors", "transformer.safetensors")
    digest = hashlib.sha256(b"".join((WEIGHTS / name).read_bytes() for name in files)).hexdigest()[:16]
    assert report["weights"] == digest, "run benchmarks/demo_model/sweep.py again"
    assert json.loads((WEIGHTS / "evaluation.json").read_bytes()) == report
    settings = program.default_settings(report)
    stg.apply(demo.load(), layers=list(settings.layers), scale=settings.scale, mode=settings.mode).not_to_be_entered()
    assert {row["role"] for row in report["rows"]} >= {"plain", "guided", "real"}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1 to 200"),
        (["--steps", "many"], "argument --steps: 'many' is not a whole number from 1 to 200"),
        (["--clips", "1.5"], "argument --clips: '1.5' is not a whole number from 1 to 480"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number"),
        (["--scale", "nan"], "argument --scale: 'nan' is not a number from -10 to 10"),
        (["--guidance-scale", "inf"], "argument --guidance-scale: 'inf' is not a number from 1 to 20"),
        (["--layers", "last"], "argument --layers: invalid int value: 'last'"),
        (["--out", __file__], "is a file; name a folder"),
    ],
)
def test_bad_arguments_get_one_line(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(argv)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert text in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "text"), [(["--layers", "99"], "8 layers"), (["--mode", "resdiual"], "Did you mean 'residual'")]
)
def test_bad_settings_get_the_librarys_words(
    argv: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert program.main([*argv, *TINY, "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert text in message
    assert message.count("\n") == 1
    assert not out.exists()
