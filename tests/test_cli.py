"""The command line: what it writes and prints, and how it fails: in one line, with a status, leaving nothing behind."""

from __future__ import annotations

import errno
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import stg_hooks as stg
from stg_hooks import demo
from stg_hooks.cli import app as cli
from stg_hooks.cli import calls, failures, files, main, models
from stg_hooks.study import sweep_settings
from tests import pipelines, stock_pipelines

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("--steps", "2")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def fails(result: Result, status: int, *words: str) -> None:
    """Check for one line on stderr that holds all the words, and no traceback."""
    assert result.exit_code == status, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("stg-hooks: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny random Wan pipeline, with a VAE and without a text encoder."""
    pipe, _, _ = pipelines.build("wan")
    path = tmp_path_factory.mktemp("model") / "wan"
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode every prompt as the same random numbers."""
    inputs = pipelines.load_case("wan").inputs
    optional = [*diffusers.WanPipeline._optional_components, "text_encoder", "tokenizer"]
    monkeypatch.setattr(diffusers.WanPipeline, "_optional_components", optional)
    encoded = inputs["prompt_embeds"], inputs["negative_prompt_embeds"]
    monkeypatch.setattr(diffusers.WanPipeline, "encode_prompt", lambda *_, **__: encoded)


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def _own_interrupts() -> Iterator[None]:
    """Undo that a command that was interrupted ignores further interrupts: it takes this process to be over."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# --- layers -----------------------------------------------------------------------------------------------------------


def test_layers_prints_the_table() -> None:
    result = run("layers", "demo")
    assert result.exit_code == 0
    assert result.stdout.strip() == str(stg.layers(demo.load()))


def test_layers_for_machines() -> None:
    result = run("layers", "demo", "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(stg.layers(demo.load()).to_dict()))


@pytest.mark.usefixtures("prompts")
def test_layers_of_a_folder_without_its_weights(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for name in ("model_index.json", "transformer/config.json"):
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        (bare / name).write_bytes((folder / name).read_bytes())
    expected = str(stg.layers(diffusers.WanPipeline.from_pretrained(folder)))
    assert run("layers", bare).stdout.strip() == expected
    assert run("layers", bare / "transformer").stdout.strip() == expected.replace("transformer (", "", 1).replace(
        ")", "", 1
    )


# --- generate ---------------------------------------------------------------------------------------------------------


def guided(scale: float, seed: int = 0) -> np.ndarray:
    pipe = demo.load()
    with stg.apply(pipe, [2], scale):
        frames = demo.sample(pipe, "red 8 blue 2", torch.Generator().manual_seed(seed), num_inference_steps=2)
    return frames.numpy()


@pytest.mark.parametrize(("scale", "seed"), [(1.0, 0), (0.0, 3)])
def test_generate_makes_what_the_library_makes(tmp_path: Path, scale: float, seed: int) -> None:
    out = tmp_path / "new" / "out.png"  # lossless
    result = run(
        "generate", "demo", "-p", "red 8 blue 2", "--layers", "2", "--scale", scale, "--seed", seed, *SHORT, "-o", out
    )
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        frames = []
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.asarray(picture.convert("RGB"))[::8, ::8])
    assert np.array_equal(np.stack(frames), guided(scale, seed))
    assert [file.name for file in out.parent.iterdir()] == ["out.png"]


@pytest.mark.parametrize("ending", [".mp4", ".webp", ".gif"])
def test_generate_writes_videos(tmp_path: Path, ending: str) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 33, 47, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    files.write_frames(tmp_path / f"out{ending}", frames, 8)
    assert len(imageio.mimread(tmp_path / f"out{ending}", memtest=False)) == 5
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("prompts")
def test_generate_with_a_model_from_a_folder(folder: Path, tmp_path: Path) -> None:
    size = ("--width", 16, "--height", 16, "--frames", 5)
    out = tmp_path / "out.png"
    result = run(
        "generate", folder, "-p", "anything", "--layers", "blocks.3", *size, *SHORT, "--device", "cpu", "-o", out
    )
    assert result.exit_code == 0, result.output
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    with stg.apply(pipe, [3], 1.0):
        generator = torch.Generator().manual_seed(0)
        video = pipe("", width=16, height=16, num_frames=5, num_inference_steps=2, generator=generator).frames[0]
    with Image.open(out) as picture:
        assert picture.n_frames == len(video)
        assert np.array_equal(np.asarray(picture.convert("RGB"))[::8, ::8], (video[0] * 255).round().astype(np.uint8))


def pictures(path: Path) -> bytes:
    with Image.open(path) as picture:
        picture.seek(picture.n_frames - 1)
        return picture.convert("RGB").tobytes()


def test_settings_from_a_file(tmp_path: Path) -> None:
    """What `apply` and a sweep write; what is typed beside it counts instead."""
    saved, out, typed = tmp_path / "s.json", tmp_path / "a.png", tmp_path / "b.png"
    applied = stg.apply(demo.load(), [2], 2.0, mode="attention", stop=0.6)
    applied.not_to_be_entered()
    saved.write_text(json.dumps(applied.to_dict()))
    for more, settings in (
        ((), ("--layers", 2, "--scale", 2, "--mode", "attention", "--stop", 0.6)),
        (("--scale", 0.5), ("--layers", 2, "--scale", 0.5, "--mode", "attention", "--stop", 0.6)),
    ):
        for file, options in ((out, ("--settings", saved, *more)), (typed, settings)):
            result = run("generate", "demo", *options, *SHORT, "--force", "-o", file)
            assert result.exit_code == 0, result.output
        assert pictures(out) == pictures(typed)
    saved.write_text(json.dumps({"layers": [2], "guidance_scale": 3.0}))  # as of a Guider
    for file, options in ((out, ("--settings", saved)), (typed, ("--layers", 2, "--guidance-scale", 3.0))):
        assert run("generate", "demo", *options, *SHORT, "--force", "-o", file).exit_code == 0
    assert pictures(out) == pictures(typed)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["No such file"]),
        ("{layers", ["not valid JSON"]),
        ("[34]", ["expected an object"]),
        ('{"layer": [2]}', ["unknown setting 'layer'; choose from", "Did you mean 'layers'"]),
        ('{"layers": [99]}', ["layers=[99]", "8 layers"]),
        ('{"layers": [2], "scale": "1"}', ["scale='1': expected a number"]),
        ('{"layers": [2], "mode": "residuals"}', ["mode 'residuals'", "Did you mean 'residual'"]),
        ('{"layers": [2], "stop": 7}', ["stop=7: expected a part"]),
        ('{"layers": [2], "guidance_scale": "a"}', ['guidance_scale="a": expected a number']),
        ("null", ["expected an object", "not null"]),
        ('{"layers": [88]}', ["See stg-hooks layers MODEL"]),
        ('{"branches": [{"layer": 2}]}', ["branches=", "expected layers"]),
        ('{"layers": [2], "scale": "nowhere:fading"}', ["scale='nowhere:fading'", "import nowhere first"]),
    ],
)
def test_a_file_of_settings_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, words: list[str]
) -> None:
    monkeypatch.setattr(cli.Source, "pipeline", lambda self: pytest.fail("loaded"))
    file = tmp_path / "s.json"
    if text is not None:
        file.write_text(text)
    fails(run("generate", "demo", "--settings", file, "-o", tmp_path / "out.webp"), 2, f"--settings {file}: ", *words)


def test_what_is_typed_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text('{"layers": [2], "scale": 1.0}')
    result = run("generate", "demo", "--settings", file, "--rescale", 7, "-o", tmp_path / "out.webp")
    fails(result, 2, "--rescale 7")
    assert "s.json" not in result.stderr


@pytest.fixture
def svd(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have MODEL be a tiny pipeline that makes a video of an image alone."""
    pipe = stock_pipelines.STOCK["StableVideoDiffusionPipeline"].build()
    monkeypatch.setattr(models.Source, "pipeline", lambda self: pipe)
    monkeypatch.setattr(models.Source, "denoisers", lambda self: {"unet": pipe.unet})
    return pipe


SVD = ("--layers", "0", *SHORT)
SIZE = ("height=64", "width=64", "num_frames=3")
SET = [word for setting in SIZE for word in ("--set", setting)]
OPTIONS = ("--height", "64", "--width", "64", "--frames", "3")


def test_an_image_instead_of_a_prompt(svd: Any, tmp_path: Path) -> None:
    picture, out = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3)).save(picture)
    torch.manual_seed(0)  # the pipeline adds noise to the image, with the global generator
    result = run("generate", "svd", "--image", picture, *SVD, *OPTIONS, "-o", out)
    assert result.exit_code == 0, result.output
    torch.manual_seed(0)
    with stg.apply(svd, [0]), Image.open(picture) as image:
        generator = torch.Generator().manual_seed(0)
        frames = svd(image, 64, 64, 3, 2, generator=generator, output_type="np").frames[0]
    with Image.open(out) as made:
        assert made.n_frames == 3
        assert np.array_equal(np.asarray(made.convert("RGB"))[::2, ::2], (frames[0] * 255).round().astype(np.uint8))
    found = run("sweep", "svd", "--image", picture, *SVD, *SET, "--scales", "1", "--out", tmp_path)
    assert found.exit_code == 0, found.output
    [_, cell] = stg.results.Sweep.load(tmp_path).cells
    assert "prompt" not in cell.code
    found = run("profile", "svd", "--image", picture, *SVD, *SET, "--levels", "1", "--out", tmp_path)
    assert found.exit_code == 0, found.output
    assert stg.results.Profile.load(tmp_path).prompts == ("",)
    found = run("bench", "svd", "--image", picture, *SVD, *SET, "--rounds", "1", "--json")
    assert found.exit_code == 0, found.output


def test_an_image_or_a_prompt_that_cannot_be_used(svd: Any, tmp_path: Path) -> None:
    picture, text = tmp_path / "in.png", tmp_path / "in.txt"
    Image.new("RGB", (16, 16)).save(picture)
    text.write_text("no picture")
    out = ("-o", tmp_path / "out.png")
    fails(run("generate", "svd", "--image", tmp_path / "none.png", *SVD, *out), 1, "--image", "none.png")
    fails(run("generate", "svd", "--image", text, *SVD, *out), 1, "--image", "in.txt")
    fails(run("generate", "svd", *SVD, *out), 2, "--prompt is missing", "--image")
    fails(run("generate", "svd", "--image", picture, "-p", "a fox", *SVD, *out), 2, "'a fox'", "without a prompt")
    fails(run("sweep", "svd", "--image", picture, "-p", "a fox", *SVD, "-o", tmp_path / "new"), 2, "without a prompt")
    assert {path.name for path in tmp_path.iterdir()} == {"in.png", "in.txt"}


def test_a_setting_without_an_option_of_its_own() -> None:
    options = calls.options_from({"fps": 8, "image": None}, ["height=480", "text=a b=c", "flag=true"])
    assert calls.settings_of(options) == {"fps": 8, "height": 480, "text": "a b=c", "flag": True}
    fails(run("generate", "demo", "--layers", "2", "--set", "height", "-o", "x.png"), 2, "--set 'height'", "name=value")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("heigth=32", ["no such argument", "Did you mean 'height'"]),
        ("prompt=hi", ["has an option of its own: --prompt hi"]),
        ("num_inference_steps=2", ["has an option of its own: --steps 2"]),
        ("height=64", ["has an option of its own: --height 64"]),
        ("generator=1", ["cannot be set", "--seed"]),
        ("output_type=latent", ["cannot be set"]),
        ("return_dict=false", ["cannot be set"]),
        ("callback_on_step_end=print", ["cannot be set", "a function"]),
        ("sigma=NaN", ["finite"]),
    ],
)
def test_a_setting_that_is_not_to_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, words: list[str]
) -> None:
    monkeypatch.setattr(cli.Source, "pipeline", lambda self: pytest.fail("loaded"))
    fails(
        run("generate", "demo", "--layers", "2", "--set", typed, "-o", tmp_path / "x.png"), 2, f"--set {typed}", *words
    )


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--set", "num_videos_per_prompt=abc"], ["--set num_videos_per_prompt=abc: the pipeline refused it: "]),
        (["--width", "100"], ["--width 100: the pipeline refused it: ", "divisible by 16"]),
        (["-n", "ugly"], ["--negative-prompt ugly: the pipeline refused it: "]),
        (["-p", "purple cat"], ["--prompt 'purple cat': the pipeline refused it: ", "cannot be drawn"]),
    ],
)
def test_what_the_pipeline_refuses_is_named_as_it_was_typed(tmp_path: Path, typed: list[str], words: list[str]) -> None:
    result = run("generate", "demo", "--layers", "2", "--steps", "1", *typed, "-o", tmp_path / "x.png")
    fails(result, 2, *words)
    assert len(result.stderr.splitlines()) == 1


def test_what_fails_after_the_first_step_is_not_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise ValueError("in the end")

    monkeypatch.setattr(demo, "to_video", fail)
    result = run("generate", "demo", "--layers", "2", "--steps", "1", "-o", tmp_path / "x.png")
    fails(result, 1, "ValueError: in the end")


@pytest.mark.parametrize(
    ("command", "typed", "words"),
    [
        ("sweep", ["--set", "heigth=3"], ["--set heigth=3", "Did you mean"]),
        ("sweep", ["--set", "height=abc"], ["--set height=abc: the pipeline refused it"]),
        ("sweep", ["-p", "red 3 blue 7", "-p", ""], ["--prompt '': the pipeline refused it"]),
        ("profile", ["--set", "height=abc"], ["--set height=abc: the pipeline refused it"]),
        ("profile", ["-p", "no"], ["--prompt no: the pipeline refused it"]),
    ],
)
def test_nothing_is_written_of_what_can_only_fail(
    tmp_path: Path, command: str, typed: list[str], words: list[str]
) -> None:
    fails(run(command, "demo", "--layers", "2", *typed, "-o", tmp_path / "new"), 2, *words)
    assert not list(tmp_path.iterdir())


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "99"], ["--layers 99: ", "8 layers", "stg-hooks layers MODEL"]),
        (["--layers", "2,,3"], ["--layers '2,,3'"]),
        (["--layers", "2", "--mode", "residuals"], ["'residuals'", "residual"]),
        (["--layers", "2", "--rescale", "7"], ["rescale"]),
        ([], ["no layers given", "stg-hooks layers MODEL"]),
    ],
)
def test_bad_settings_fail_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.setattr(cli.Source, "pipeline", lambda self: pytest.fail("loaded"))
    fails(run("generate", "demo", *arguments, "-o", tmp_path / "out.webp"), 2, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["generate", "demo", "--steps", "many", "-o", "x.png"], ["'--steps'", "expected", "generate --help"]),
        (["generate", "demo", "--scale", "abc", "-o", "x.png"], ["'--scale'", "expected"]),
        (["generate", "demo", "--seed", "9" * 23, "-o", "x.png"], ["'--seed'", "2**64"]),
        (["generate", "demo", "--scal", "1", "-o", "x.png"], ["--scal", "--scale"]),
        (["generate", "demo"], ["Missing option '--out'"]),
        (["generate", "-o", "x.png"], ["MODEL"]),
        (["generate", "demo", "other", "-o", "x.png"], ["(other)"]),
        (["no-such-command"], ["no-such-command"]),
        (["--no-such-option"], ["--no-such-option"]),
        # One value each, that can be meant.
        (["generate", "demo", "--scale", "1", "--scale", "2", "-o", "x.png"], ["--scale is given 2 times"]),
        (["generate", "demo", "-p", "a", "--prompt", "b", "-o", "x.png"], ["--prompt is given 2 times"]),
        (["generate", "demo", "-o", "x.png", "-o", "y.png"], ["--out is given 2 times"]),
        (["generate", "demo", "--guidance-scale", "nan", "-o", "x.png"], ["--guidance-scale nan", "finite"]),
        (["profile", "demo", "--guidance-scale", "inf", "-o", "x"], ["--guidance-scale inf", "finite"]),
        (["generate", "demo", "--scale", "nan", "-o", "x.png"], ["--scale nan", "finite"]),
        (["generate", "demo", "--fps", "inf", "-o", "x.png"], ["--fps inf", "finite"]),
        (["generate", "demo", "--mode", "", "-o", "x.png"], ["--mode is empty"]),
        (["generate", "demo", "--settings", "", "-o", "x.png"], ["--settings is empty"]),
        (["layers", ""], ["MODEL is empty"]),
        (["profile", "demo", "-o", " "], ["--out is empty"]),
        (["generate", "demo", "--layers", "2", "--device", "meta", "-o", "x.png"], ["--device meta"]),
    ],
)
def test_a_bad_option_is_a_usage_error_in_one_line(typed: list[str], words: list[str]) -> None:
    result = run(*typed)
    fails(result, 2, *words)
    assert len(result.stderr.splitlines()) == 1


def test_an_existing_file_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.webp"
    out.write_text("mine")
    fails(run("generate", "demo", "--layers", "2", "-o", out), 2, "exists already", "--force")
    assert out.read_text() == "mine"
    assert run("generate", "demo", "--layers", "2", *SHORT, "--force", "-o", out).exit_code == 0
    assert out.read_bytes()[:4] == b"RIFF"


@pytest.mark.parametrize("name", ["out", "out.avi", "folder"])
def test_an_output_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    fails(run("generate", "demo", "--layers", "2", "-o", tmp_path / name), 2)


def test_a_folder_that_does_not_exist() -> None:
    fails(run("layers", "./nothing"), 1, "./nothing: no such folder")
    fails(run("layers", "nothing"), 1, "nothing: no such folder")


def test_a_folder_without_a_pipeline(tmp_path: Path) -> None:
    fails(run("layers", tmp_path), 1, "no pipeline that diffusers can load")
    (tmp_path / "config.json").write_text("{}")
    fails(run("layers", tmp_path), 1, "names no diffusers class")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
def test_a_model_of_the_hub_without_a_network() -> None:
    fails(run("layers", "nobody/nothing"), 1, "nobody/nothing: not on this machine", "HF_HUB_OFFLINE")


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ["no space left"]),
        (ConnectionError("no route"), ["the hub cannot be reached"]),
        (OSError("RepositoryNotFoundError"), ["the hub"]),
    ],
)
def test_the_hub_fails(monkeypatch: pytest.MonkeyPatch, raised: OSError, words: list[str]) -> None:
    def load_config(*_: Any, **__: Any) -> None:
        raise OSError("cannot load") from raised

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load_config)
    fails(run("layers", "somebody/something"), 1, *words)


@pytest.mark.parametrize("ending", [".mp4", ".webp"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        next(tmp_path.glob(".out*"), tmp_path / ".out.partial").write_text("half of it")
        raise OSError(errno.ENOSPC, "No space left on device", "out")

    old = tmp_path / f"out{ending}"
    old.write_text("the old one")
    monkeypatch.setattr("PIL.Image.Image.save", lambda self, path, *_, **__: (Path(path).touch(), full()))
    monkeypatch.setattr("imageio.v2.get_writer", lambda path, *_, **__: (Path(path).touch(), full()))
    fails(run("generate", "demo", "--layers", "2", *SHORT, "--force", "-o", old), 1, "no space left on the device")
    assert old.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [old]


def test_a_video_that_the_encoder_cut_short_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda _: (3, 0.4))
    fails(run("generate", "demo", "--layers", "2", *SHORT, "-o", tmp_path / "out.mp4"), 1, "only 3 of 6 frames")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_write_mp4", interrupted)
    fails(run("generate", "demo", "--layers", "2", *SHORT, "-o", tmp_path / "out.mp4"), 130, "interrupted")
    assert list(tmp_path.iterdir()) == []


def test_mp4_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails(run("generate", "demo", "--layers", "2", "-o", tmp_path / "out.mp4"), 1, "pip install imageio-ffmpeg,")


@pytest.mark.parametrize(
    ("hidden", "installed"),
    [
        ("typer", "typer rich"),
        pytest.param("rich", "typer rich", marks=pytest.mark.slow),
        pytest.param("diffusers", "diffusers", marks=pytest.mark.slow),
    ],
)
def test_a_missing_package_says_what_to_install(hidden: str, installed: str) -> None:
    """In a process of its own: here the package has been imported already."""
    code = f"import sys; sys.modules[{hidden!r}] = None; sys.argv[1:] = ['layers', 'demo']; "
    code += "from stg_hooks.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"pip install {installed}" in done.stderr.splitlines()[-1]


def test_a_device_that_is_not_there() -> None:
    fails(run("generate", "demo", "--layers", "2", "--device", "toaster", "-o", "x.png"), 2, "toaster")
    if not torch.cuda.is_available():
        fails(run("generate", "demo", "--layers", "2", "--device", "cuda", "-o", "x.png"), 1, "finds no cuda device")


def test_processes_of_a_launcher_have_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert models.Source("demo").where == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert models.Source("demo").where == "cuda:3"
    assert models.Source("demo", device="cuda:1").where == "cuda:1"


@pytest.mark.usefixtures("prompts")
def test_offloading_is_the_pipelines_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload", "to"):
        monkeypatch.setattr(diffusers.WanPipeline, name, lambda *_, name=name, **__: seen.append(name))
    for offload in models.Offload:
        models.Source(str(folder), device="cpu", offload=offload).pipeline()
    assert seen == ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"]
    fails(run("generate", "demo", "--layers", "2", "--offload", "model", "-o", "x.png"), 2, "--offload model")


@pytest.mark.usefixtures("prompts")
def test_the_dtype_of_the_weights(folder: Path) -> None:
    assert models.Source(str(folder), device="cpu").pipeline().transformer.dtype == torch.float32
    half = models.Source(str(folder), models.Dtype.bfloat16, "cpu").pipeline()
    assert half.transformer.patch_embedding.weight.dtype == torch.bfloat16


# --- sweep, bench, demo -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sweep(tmp_path: Path) -> None:
    arguments = ("sweep", "demo", "--layers", "2,2+5", "--scales", "0.5", "--seeds", "1", *SHORT, "--out", tmp_path)
    assert run(*arguments).exit_code == 0
    names = {file.parent.name for file in tmp_path.glob("cells/*/cell.json")}
    assert names == {"baseline", "residual-L2-s0.5", "residual-L2+5-s0.5"}
    fails(run("sweep", "demo", "--layers", "2", "--scales", "x", "--out", tmp_path), 2, "--scales 'x'")
    fails(run("sweep", "demo", "--layers", "2,88", "--out", tmp_path), 2, "--layers 88: ")
    fails(run("sweep", "demo", "--layers", "3", *SHORT, "--out", tmp_path), 2, str(tmp_path), "--layers 2,2+5 there")


@pytest.mark.slow
def test_profile_and_report(tmp_path: Path) -> None:
    result = run("profile", "demo", "--layers", "2,5", "--levels", "2", *SHORT, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    expected = stg.profile(demo.load(), [2, 5], ["residual"], 2, num_inference_steps=2)
    assert result.stdout.strip() == str(expected)
    one_by_one = run(
        "profile", "demo", "--layers", "2,5", "--levels", "2", "--layers-at-once", 1, *SHORT, "-o", tmp_path
    )
    assert one_by_one.stdout == result.stdout
    assert json.loads((tmp_path / "profile.json").read_text())["kind"] == "profile"
    assert run("report", tmp_path, "--plots").exit_code == 0
    assert "</html>" in (tmp_path / "report.html").read_text()
    assert list(tmp_path.glob("*.png"))


def test_profile_checks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.Source, "pipeline", lambda self: pytest.fail("loaded"))
    fails(run("profile", "demo", "--layers", "2,77", "--out", tmp_path), 2, "--layers 77: ")
    fails(run("profile", "demo", "--layers", "2", "--modes", "residual,", "--out", tmp_path), 2, "--modes")
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.touch()
    fails(run("report", tmp_path), 2, str(tmp_path), f"stg-hooks profile MODEL --out {tmp_path}")
    fails(run("report", tmp_path / "none"), 2, "none does not exist")
    fails(run("report", file), 2, f"{file} is a file")


def test_a_failed_command_leaves_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any, path: Path, **__: Any) -> None:
        path.touch()
        raise KeyboardInterrupt

    out = tmp_path / "new" / "newer" / "x.webp"
    fails(run("generate", "demo", "--layers", "99", "-o", out), 2)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("PIL.Image.Image.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_frames(out, np.zeros((1, 4, 4, 3), np.uint8), 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "typed", "words", "others"),
    [
        ("generate", [], ["no layers given", "stg-hooks profile MODEL --out DIR measures"], ["num_layers", "stg."]),
        ("generate", ["--layers", "[2,5]"], ["--layers '[2,5]'", "--layers 2+5"], ["2,5;"]),
        ("generate", ["--layers", "2.5"], ["--layers 2+5"], ["Did you mean"]),
        ("profile", ["--layers", "2:5"], ["--layers 2,5"], ["2+5"]),
        ("sweep", ["--layers", "2 5"], ["--layers 2+5", "--layers 2,5"], []),
        ("sweep", ["--layers", "2-5"], ["--layers 2+5", "--layers 2,5"], []),
        ("sweep", ["--layers", "2,2"], ["--layers 2,2: 2 is there twice"], ["["]),
        ("sweep", ["--layers", "2,blocks.2"], ["--layers 2,2"], ["["]),
        ("sweep", ["--scales", "1,1.0"], ["--scales 1,1.0"], ["["]),
        ("sweep", ["--scales", "nan"], ["--scales nan"], []),
        ("sweep", ["--modes", "values,values"], ["--modes values,values"], ["("]),
        ("sweep", ["--layers", "2", "--modes", "foo"], ["--modes 'foo'"], ["callable"]),
        ("profile", ["--layers", "2", "--modes", "foo"], ["--modes 'foo'"], ["callable"]),
        ("generate", ["--layers", "2", "--mode", "foo"], ["--mode 'foo'"], ["callable"]),
    ],
)
def test_errors_are_in_the_words_of_the_command_line(
    tmp_path: Path, command: str, typed: list[str], words: list[str], others: list[str]
) -> None:
    result = run(command, "demo", *typed, "-o", tmp_path / "x.png")
    fails(result, 2, *words)
    assert not [word for word in others if word in result.stderr]


def test_other_settings_are_told_as_they_are_typed() -> None:
    found = {"layers": [[2], [2, 5]], "prompts": ["a b"], "settings": {"num_inference_steps": 2}}
    asked = {"layers": [[3]], "prompts": ["a b"], "settings": {"num_inference_steps": 4}}
    with pytest.raises(typer.Exit) as stopped, failures.reported("layers"):
        sweep_settings.check_same(Path("there"), found, asked)
    assert stopped.value.exit_code == 2
    with pytest.raises(stg.ResultsError) as caught:
        sweep_settings.check_same(Path("there"), found, asked)
    line = failures._in_its_words(str(caught.value), ["layers"])
    assert "--layers 2,2+5 there and --layers 3 here; --steps 2 there and --steps 4 here" in line


@pytest.mark.slow
def test_bench() -> None:
    result = run("bench", "demo", "--layers", "6", "--steps", "3", "--rounds", "2", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["execution"] for row in rows] == ["plain", "full", "sequential", "batched"]
    assert all(row["steps"] == 4 and row["seconds"] > 0 for row in rows)
    assert rows[0]["relative"] == 1


def test_where_nothing_can_be_written_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.Source, "pipeline", lambda self: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "new"
    for command in (("profile", "demo"), ("sweep", "demo"), ("generate", "demo", "--layers", "2")):
        out = inside / "out.webp" if command[0] == "generate" else inside
        fails(run(*command, "--out", out), 2, "is a file")
    monkeypatch.setattr("os.access", lambda *_: False)
    for command in (("profile", "demo"), ("sweep", "demo"), ("generate", "demo", "--layers", "2")):
        fails(run(*command, "--out", tmp_path / "new" / "out.webp"), 1, "cannot be written to")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_demo_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("stg_hooks.demo.__main__.main", lambda argv: given.append(argv) or 1)
    assert run("demo", "--out", tmp_path, "--clips", "2").exit_code == 1
    assert given == [["--out", str(tmp_path), "--clips", "2", "--seed", "0"]]


# --- in the words of the command line, and at once --------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]])
def test_what_needs_no_model_loads_no_torch(arguments: list[str]) -> None:
    code = f"import sys; sys.argv[1:] = {arguments}\nfrom stg_hooks.cli import main\n"
    code += "try:\n    main()\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.split() == ["False"]


def test_the_faces_stay_what_they_are_whatever_is_imported_first() -> None:
    code = "import stg_hooks.apply, stg_hooks.skip, stg_hooks.step; import stg_hooks as stg; "
    code += "print(stg.apply.__name__, stg.skip.__name__, stg.Step.__name__, all(map(stg.__getattr__, stg.__all__)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["apply", "skip", "Step", "True"]


def test_an_interrupt_while_the_command_line_loads(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for where in ("importlib.import_module", "stg_hooks.cli.app.app"):
        with monkeypatch.context() as patch:
            patch.setattr(where, interrupted)
            with pytest.raises(SystemExit) as stopped:
                main()
        assert stopped.value.code == 130
        assert capsys.readouterr().err == "stg-hooks: interrupted.\n"


WITHIN_AN_IMPORT = """
class Finder:
    def find_spec(self, name, *_):
        if name == "typer":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                raise RuntimeError from None

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("before", "status", "lines"),
    [
        # Within an import, which makes another error of an exception.
        (WITHIN_AN_IMPORT, 130, ["stg-hooks: interrupted."]),
        # After the work, while Python ends: what is registered first runs last.
        ("atexit.register(os.kill, os.getpid(), signal.SIGINT)", 0, []),
    ],
)
def test_an_interrupt_before_and_after(before: str, status: int, lines: list[str]) -> None:
    # A shell's background processes ignore interrupts, and so would this one.
    code = "import atexit, os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"sys.argv[1:] = ['--version']\n{before}\n"
    code += "from stg_hooks.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()) == (status, lines)


@pytest.mark.parametrize("where", ["make_context", "invoke"])
def test_an_interrupt_outside_of_a_command(where: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """typer itself exits with the status and says nothing."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"typer.core.TyperGroup.{where}", interrupted)
    monkeypatch.setattr("sys.argv", ["stg-hooks", "layers", "demo"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stg-hooks: interrupted.\n"


@pytest.mark.parametrize(
    ("command", "typed", "words"),
    [
        ("generate", ["--layers", "2,5"], ["--layers 2,5", "--layers 2+5"]),
        ("bench", ["--layers", "2,5"], ["--layers 2,5", "--layers 2+5"]),
        ("profile", ["--layers", "2+5"], ["--layers 2+5", "--layers 2,5"]),
        *((name, ["--layers", "2", "--layers", "5"], ["given 2 times", "--layers 2+5", "--layers 2,5"])
          for name in ("generate", "bench", "profile", "sweep")),
    ],
)  # fmt: skip
def test_layers_mean_one_thing(tmp_path: Path, command: str, typed: list[str], words: list[str]) -> None:
    out = {"generate": ["-o", tmp_path / "out.png"], "bench": []}.get(command, ["-o", tmp_path])
    fails(run(command, "demo", *typed, *out), 2, *words)


def test_a_wrong_layer_is_not_answered_with_another(tmp_path: Path) -> None:
    assert "Did you mean" not in run("generate", "demo", "--layers", "99", "-o", tmp_path / "out.png").output


@pytest.mark.parametrize(
    "message",
    [
        "sizes differ: tensor([[1.5, 2.5],\n [3.5, 4.5]])",
        "[Errno 32] Broken pipe\n\nFFMPEG COMMAND:\nffmpeg -y -f rawvideo 1.5",
        "word " * 500,
    ],
)
def test_messages_of_others_are_cut_to_what_a_person_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(cli, "write_frames", fail)
    result = run("generate", "demo", "--layers", "2", "--steps", "1", "-o", tmp_path / "out.png")
    fails(result, 1, "RuntimeError: ")
    line = next(line for line in result.stderr.splitlines() if line.startswith("stg-hooks: "))
    assert "1.5" not in line
    assert len(line) < 400


def test_generate_says_what_the_demo_draws(tmp_path: Path) -> None:
    result = run("generate", "demo", "--layers", "2", "--steps", "1", "-o", tmp_path / "out.png")
    assert f'demo draws "{calls.DEMO_PROMPT}"' in result.stderr


# --- the pages that show it -------------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = [
    (page.name, shlex.split(line, comments=True)[1:])
    for page in PAGES
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.strip().startswith("stg-hooks ")
]


def test_every_command_that_pages_show_is_understood() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {words[0] for _, words in SHOWN} == set(commands)
    for _, (name, *arguments) in SHOWN:
        commands[name].make_context(name, list(arguments))


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for page, words in SHOWN:
        if page == "command-line.md" and ("demo" in words[1:] or words[0] == "report") and words[0] != "bench":
            result = run(*words)
            assert result.exit_code == 0, (words, result.output)
    assert (tmp_path / "digits.mp4").stat().st_size
    assert "</html>" in (tmp_path / "results" / "report.html").read_text()
    assert len(list(tmp_path.glob("results/cells/*/cell.json"))) == 7
