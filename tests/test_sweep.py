"""`sweep`: a grid of real samples that survives crashes, is shared between processes, and measures what it says."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import stg_hooks as stg
from stg_hooks import demo
from stg_hooks.study import claims, media, metrics
from tests import zoo

ROOT = Path(__file__).resolve().parent.parent
GRID: dict[str, Any] = {"layers": [1, [0, 2]], "scales": [0.5, 1.0], "seeds": 2, "progress": False}
IDS = ["baseline", "residual-L1-s0.5", "residual-L1-s1.0", "residual-L0+2-s0.5", "residual-L0+2-s1.0"]

pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")


class Toy:
    """A tiny denoiser in a loop of four steps, and the samples that it is asked for."""

    def __init__(self, frames: int = 3, watch: Callable[[int], None] = lambda count: None) -> None:
        self.model = zoo.build("plain")
        self.frames = frames
        self.watch = watch
        """Called with the number of samples that were asked for, this one included."""
        self.asked: list[str] = []

    def __call__(self, prompt: str, generator: torch.Generator) -> Tensor:
        self.asked.append(prompt)
        self.watch(len(self.asked))
        x = torch.randn(1, 18, zoo.DIM, generator=generator)
        text = torch.full((1, 3, zoo.DIM), len(prompt) / 10)
        for _ in range(4):
            x = x - 0.2 * self.model(x, text)
        return x.flatten()[: 48 * self.frames].reshape(self.frames, 4, 4, 3).sigmoid()

    def sweep(self, out: Path, **changes: Any) -> stg.results.Sweep:
        return stg.sweep(self.model, ["a", "bb"], out=out, sample=self, **{**GRID, **changes})


def failing(error: BaseException, *counts: int) -> Callable[[int], None]:
    """Let some samples fail."""

    def watch(count: int) -> None:
        if count in counts:
            raise error

    return watch


def files(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


# --- what is made ---------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    toy = Toy()
    found = toy.sweep(tmp_path, modes=["residual"])
    assert [cell.id for cell in found.cells] == IDS
    assert toy.asked[:4] == ["a", "a", "bb", "bb"], "the baseline comes first"
    settings = json.loads((tmp_path / "sweep.json").read_text())
    assert len(settings.pop("weights")) == 16
    assert settings == {
        "kind": "sweep",
        "version": 1,
        "model": "DiT",
        "pipeline": None,
        "layers": [[1], [0, 2]],
        "modes": ["residual"],
        "scales": [0.5, 1.0],
        "prompts": ["a", "bb"],
        "seeds": [0, 1],
        "guidance_scale": None,
        "fps": 8,
        "settings": {},
        "metrics": [],
    }
    for name in IDS:
        folder = tmp_path / "cells" / name
        cell = json.loads((folder / "cell.json").read_text())
        assert (cell["id"], cell["status"], cell["error"]) == (name, "done", None)
        assert [(sample["prompt"], sample["seed"]) for sample in cell["samples"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for sample in cell["samples"]:
            assert sample["file"] == f"p{sample['prompt']}-s{sample['seed']}.webp"
            assert (folder / sample["file"]).exists()
            with Image.open(folder / sample["strip"]) as strip:
                assert strip.size == (sample["frames"] * sample["width"], sample["height"]) == (12, 4)
        for metric, value in cell["metrics"].items():
            expected = np.mean([sample["metrics"][metric] for sample in cell["samples"]])
            assert value == pytest.approx(expected), metric
    assert not any((tmp_path / "claims").iterdir())
    assert not any((tmp_path / "partial").iterdir())
    assert repr(found).startswith(f"{tmp_path}: 5 of 5 cells")


def test_samples_are_those_of_apply(tmp_path: Path) -> None:
    toy = Toy()
    toy.sweep(tmp_path)
    for name, layers, scale in (("baseline", None, 0.0), ("residual-L0+2-s0.5", [0, 2], 0.5)):
        for j, seed in enumerate([0, 1]):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                if layers is None:
                    expected = toy("bb", generator)
                else:
                    with stg.apply(toy.model, layers=layers, scale=scale):
                        expected = toy("bb", generator)
            pixels = (expected * 255).round().to(torch.uint8)
            with Image.open(tmp_path / "cells" / name / f"p1-s{j}.strip.webp") as strip:
                frames = torch.tensor(np.asarray(strip.convert("RGB"))).unflatten(1, (3, 4)).transpose(0, 1)
            assert torch.equal(frames, pixels)


@pytest.mark.slow
def test_metrics_and_cost(tmp_path: Path) -> None:
    toy = Toy()
    seen: list[tuple[Any, str]] = []

    def brightness(video: Any, prompt: str) -> float:
        seen.append((video, prompt))
        return float(video.mean())

    found = toy.sweep(tmp_path, metrics=[brightness])
    video, prompt = seen[-1]
    assert (video.shape, video.dtype, prompt) == ((3, 4, 4, 3), np.float32, "bb")
    assert 0 <= video.min() <= video.max() <= 1
    base, *cells = found.cells
    assert base.metrics["difference"] == base.cost == 0.0
    samples = {c.id: seen[4 * i : 4 * i + 4] for i, c in enumerate(found.cells)}
    for cell in cells:
        expected = [abs(a - b).mean() for (a, _), (b, _) in zip(samples[cell.id], samples["baseline"], strict=True)]
        assert cell.metrics["difference"] == pytest.approx(np.mean(expected), rel=1e-5)
        assert cell.metrics["brightness"] == pytest.approx(np.mean([v.mean() for v, _ in samples[cell.id]]), rel=1e-5)
    costs = {cell.id: cell.cost for cell in cells}
    # Four equal blocks, and no CFG: after layer 1 run two of them; after layer 0, with 2 skipped, two as well.
    assert costs["residual-L1-s1.0"] == pytest.approx(0.5, abs=0.1)
    assert costs["residual-L0+2-s1.0"] == pytest.approx(costs["residual-L1-s1.0"], rel=1e-6)


@pytest.mark.slow
def test_images(tmp_path: Path) -> None:
    found = Toy(frames=1).sweep(tmp_path)
    sample = found.cells[1].samples[0]
    assert (sample.file, sample.frames) == ("p0-s0.png", 1)
    assert sample.metrics["flicker"] is sample.metrics["motion"] is None
    assert found.cells[1].metrics["motion"] is None
    assert found.cells[1].code.endswith("image = sample(prompt, generator)")


@pytest.mark.slow
def test_a_stock_pipeline(tmp_path: Path) -> None:
    """The embedded model: one cell against the pipeline called by hand."""
    pipe = demo.load()
    found = stg.sweep(
        pipe, "red 3 blue 7", out=tmp_path, layers=[6], scales=[0.5], progress=False, num_inference_steps=3
    )
    assert found.settings["pipeline"] == "WanPipeline"
    assert found.settings["guidance_scale"] == demo.GUIDANCE_SCALE
    assert found.settings["settings"] == {"num_inference_steps": 3}
    saved = json.loads((tmp_path / "cells/residual-L6-s0.5/settings.json").read_text())
    assert saved == found.cells[1].settings == {"layers": [6], "scale": 0.5, "mode": "residual"}
    assert not (tmp_path / "cells/baseline/settings.json").exists()
    call = {**demo.inputs(["red 3 blue 7"]), "num_inference_steps": 3, "guidance_scale": demo.GUIDANCE_SCALE}
    with stg.apply(pipe, **saved):
        latents = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    with Image.open(tmp_path / "cells/residual-L6-s0.5/p0-s0.strip.webp") as strip:
        frames = torch.tensor(np.asarray(strip.convert("RGB"))).unflatten(1, (6, 16)).transpose(0, 1)
    assert torch.equal(frames, demo.to_video(latents)[0])
    assert found.cells[1].code == (
        "from stg_hooks import demo\n"
        "pipe = demo.load()\n"
        "with stg.apply(pipe, layers=[6], scale=0.5):\n"
        "    video = demo.to_video(pipe(**demo.inputs([prompt]) | dict(guidance_scale=2.0, "
        "num_inference_steps=3), generator=generator).frames)[0]"
    )
    names = {"stg": stg, "prompt": "red 3 blue 7", "generator": torch.Generator().manual_seed(0)}
    exec(found.cells[1].code, names)
    assert torch.equal(frames, names["video"])


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_finished_sweep_makes_nothing_again(tmp_path: Path) -> None:
    Toy().sweep(tmp_path)
    before = files(tmp_path)
    toy = Toy()
    toy.sweep(tmp_path)
    assert toy.asked == []
    assert files(tmp_path) == before


def test_an_interrupted_sweep_loses_the_cell_in_work_only(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Toy(watch=failing(KeyboardInterrupt(), 11)).sweep(tmp_path)  # in the middle of the third cell
    assert [cell.id for cell in stg.results.Sweep.load(tmp_path).cells] == IDS[:2]
    assert not any((tmp_path / "claims").iterdir())
    assert not any((tmp_path / "partial").iterdir())
    before = files(tmp_path)
    toy = Toy()
    found = toy.sweep(tmp_path)
    assert len(toy.asked) == 3 * 4
    assert [cell.id for cell in found.cells] == IDS
    assert {name: files(tmp_path)[name] for name in before} == before


def test_other_settings_are_refused(tmp_path: Path) -> None:
    small: dict[str, Any] = {"layers": [0], "scales": [1.0], "seeds": 1}
    Toy().sweep(tmp_path, **small)
    before = files(tmp_path)
    for changes, text in (
        ({"scales": [0.5]}, r"scales is \[1\.0\] there and \[0\.5\] here"),
        ({"seeds": 2}, r"seeds is \[0\] there and \[0, 1\] here"),
        ({"fps": 9}, r"fps is 8 there and 9 here"),
        ({"metrics": {"one": lambda video, prompt: 1.0}}, r"metrics is \[\] there and \['one'\] here"),
    ):
        with pytest.raises(stg.ResultsError, match=f"holds a sweep with other settings: {text}"):
            Toy().sweep(tmp_path, **{**small, **changes})
    assert files(tmp_path) == before


def test_tensors_among_the_settings_are_compared_by_value(tmp_path: Path) -> None:
    def sweep(image: Tensor) -> stg.results.Sweep:
        toy = Toy()
        toy.model.stg_sample = lambda prompt, generator, image: toy(prompt, generator)
        return stg.sweep(toy.model, "a", out=tmp_path, layers=[0], scales=[1.0], progress=False, image=image)

    sweep(torch.ones(3))
    sweep(torch.ones(3))
    with pytest.raises(stg.ResultsError, match=r"settings is .*tensor \(3,\) torch\.float32"):
        sweep(torch.zeros(3))


def test_failed_cells_are_recorded_and_tried_again(tmp_path: Path) -> None:
    error = RuntimeError("out of\n   memory")
    found = Toy(watch=failing(error, 6, 14)).sweep(tmp_path)  # in the second and the fourth cell
    assert [cell.id for cell in found.failed] == [IDS[1], IDS[3]]
    failed = found.failed[0]
    assert (failed.error, failed.samples, failed.metrics) == ("RuntimeError: out of memory", (), {})
    assert {file.name for file in (tmp_path / "cells" / failed.id).iterdir()} == {"cell.json", "settings.json"}
    assert len(found.cells) == 5
    assert f"{IDS[1]}: failed, RuntimeError: out of memory" in repr(found)
    toy = Toy()
    assert not toy.sweep(tmp_path).failed
    assert len(toy.asked) == 2 * 4


def test_cells_are_compared_with_nothing_where_the_baseline_failed(tmp_path: Path) -> None:
    found = Toy(watch=failing(RuntimeError("no"), 1)).sweep(tmp_path)
    assert [cell.status for cell in found.cells] == ["failed", "done", "done", "done", "done"]
    assert found.cells[1].metrics["difference"] is found.cells[1].cost is None


def test_a_sample_that_is_no_picture_fails_its_cell(tmp_path: Path) -> None:
    toy = Toy()
    for made, text in (
        (torch.zeros(1, 16, 4, 4), "no picture"),
        (torch.full((2, 4, 4, 3), float("nan")), "not finite"),
    ):
        out = tmp_path / text
        found = stg.sweep(
            toy.model, "a", out=out, sample=lambda *_, made=made: made, layers=[0], scales=[1.0], progress=False
        )
        assert all(text in cell.error for cell in found.cells)


# --- several processes ----------------------------------------------------------------------------------------------

WORKER = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.test_sweep import Toy

class Slow(Toy):
    def __call__(self, prompt, generator):
        with open(sys.argv[2], "a") as log:
            log.write("sample\\n")
        time.sleep(float(sys.argv[3]))
        return super().__call__(prompt, generator)

Slow().sweep(Path(sys.argv[1]), stale_after=float(sys.argv[4]))
"""


def worker(out: Path, log: Path, seconds: float, stale_after: float = 60.0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(out), str(log), str(seconds), str(stale_after)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)


def wait_until(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_other_weights_are_another_sweep(tmp_path: Path) -> None:
    Toy().sweep(tmp_path)
    for change in (lambda model: model.blocks[0].ff.weight.add_(1), lambda model: model.to(torch.bfloat16)):
        toy = Toy()
        with torch.no_grad():
            change(toy.model)
        with pytest.raises(stg.ResultsError, match="holds a sweep with other settings: weights is"):
            toy.sweep(tmp_path)


def test_a_full_disk_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(media, "write_sample", full)
    with pytest.raises(OSError, match="No space left"):
        Toy().sweep(tmp_path)
    assert list(tmp_path.glob("cells/*")) == list(tmp_path.glob("partial/*")) == list(tmp_path.glob("claims/*")) == []
    monkeypatch.undo()
    assert not Toy().sweep(tmp_path).failed


def test_samples_that_a_metric_fails_on_are_kept(tmp_path: Path) -> None:
    def picky(video: Any, prompt: str) -> float:
        if prompt == "bb":
            raise ValueError("two letters")
        return 1.0

    with pytest.warns(stg.StgWarning, match="the metric 'picky' failed: ValueError: two letters"):
        found = Toy().sweep(tmp_path, metrics=[picky])
    assert not found.failed
    assert [sample.metrics["picky"] for sample in found.cells[0].samples] == [1.0, 1.0, None, None]
    assert found.cells[0].metrics["picky"] == 1.0


@pytest.mark.slow
def test_two_processes_make_each_cell_once(tmp_path: Path) -> None:
    out, logs = tmp_path / "out", [tmp_path / "one", tmp_path / "two"]
    processes = [worker(out, log, 0.15) for log in logs]
    assert [process.wait(120) for process in processes] == [0, 0]
    counts = [len(log.read_text().splitlines()) if log.exists() else 0 for log in logs]
    assert sum(counts) == len(IDS) * 4, "each sample is made once"
    assert all(count % 4 == 0 for count in counts)
    found = stg.results.Sweep.load(out)
    assert [cell.id for cell in found.cells] == IDS
    assert not found.failed
    assert all(cell.metrics["difference"] is not None for cell in found.cells[1:])
    assert not any((out / "claims").iterdir())
    alone = Toy().sweep(tmp_path / "alone")
    assert [cell.metrics for cell in found.cells] == [cell.metrics for cell in alone.cells]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_process_loses_the_cell_in_work_only(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = worker(out, log, 0.1)
    cells = out / "cells"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 6)  # in the second cell
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = [name for name in IDS if (cells / name / "cell.json").exists()]
    assert "baseline" in finished
    assert len(finished) < len(IDS)
    assert any((out / "claims").iterdir()), "it had no time to let go"
    before = files(cells)
    toy = Toy()
    begun = time.monotonic()
    found = toy.sweep(out, stale_after=10_000.0)
    assert time.monotonic() - begun < 100, "a process on this machine is known to be gone at once"
    assert [cell.id for cell in found.cells] == IDS
    assert len(toy.asked) == (len(IDS) - len(finished)) * 4
    assert {name: files(cells)[name] for name in before} == before
    assert not any((out / "claims").iterdir())
    assert not any((out / "partial").iterdir())


# --- claims ---------------------------------------------------------------------------------------------------------


def test_a_claim_excludes_others_until_it_is_released(tmp_path: Path) -> None:
    with claims.claimed(tmp_path, "cell", 60) as one:
        assert one is not None
        assert one.holds
        with claims.claimed(tmp_path, "cell", 60) as two, claims.claimed(tmp_path, "cell.1", 60) as other:
            assert two is None
            assert other is not None
        assert claims.is_claimed(tmp_path, "cell", 60)
    assert not claims.is_claimed(tmp_path, "cell", 60)
    assert not any(tmp_path.iterdir())
    with claims.claimed(tmp_path, "cell", 60) as again:
        assert again is not None


def test_a_claim_is_kept_alive_while_its_owner_works(tmp_path: Path) -> None:
    with claims.claimed(tmp_path, "cell", 1.2):
        time.sleep(2.0)
        with claims.claimed(tmp_path, "cell", 1.2) as late:
            assert late is None


def elsewhere(file: Path, seconds_ago: float) -> None:
    """Turn a claim into one of another machine's, last touched some time ago."""
    file.write_text(json.dumps({"place": "another machine", "pid": 1, "token": "x"}))
    stamp = time.time() - seconds_ago
    os.utime(file, (stamp, stamp))


def test_another_machines_claim_is_taken_over_when_it_shows_no_sign_of_life(tmp_path: Path) -> None:
    elsewhere(tmp_path / "cell.0", 30)
    with claims.claimed(tmp_path, "cell", 60) as early:
        assert early is None
    with claims.claimed(tmp_path, "cell", 20) as one, claims.claimed(tmp_path, "cell", 20) as two:
        assert one is not None
        assert one.file.name == "cell.1"
        assert two is None
    assert not any(tmp_path.iterdir())


def test_who_stood_still_for_too_long_knows_that_the_work_is_anothers(tmp_path: Path) -> None:
    with claims.claimed(tmp_path, "cell", 60) as one:
        assert one is not None
        elsewhere(tmp_path / "cell.1", 0)
        assert not one.holds
    assert [file.name for file in tmp_path.iterdir()] == ["cell.0", "cell.1"] or (tmp_path / "cell.1").exists()


def test_work_that_was_taken_over_is_not_published(tmp_path: Path) -> None:
    def sleep(count: int) -> None:
        if count == 5:  # begins the second cell
            elsewhere(tmp_path / "claims" / f"{IDS[1]}.1", 0)
        if count == 9:  # the other one has finished it, and let go
            shutil.copytree(tmp_path / "cells/baseline", tmp_path / "cells" / IDS[1])
            for file in (tmp_path / "claims").glob(f"{IDS[1]}.*"):
                file.unlink()

    Toy(watch=sleep).sweep(tmp_path)
    assert json.loads((tmp_path / "cells" / IDS[1] / "cell.json").read_text())["id"] == "baseline"


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"layers": []}, stg.SettingError, r"layers=\[\]: expected at least one"),
        ({"layers": 3}, stg.SettingError, r"layers=3: expected a list"),
        ({"layers": [9]}, stg.LayerError, r"DiT has 4 layers"),
        ({"layers": [1, -3]}, stg.SettingError, r"layers=\[\[1\], \[1\]\]: something is there twice"),
        ({"scales": [0.0]}, stg.SettingError, r"0\.0 is the plain pipeline"),
        ({"scales": [float("nan")]}, stg.SettingError, r"scale=nan"),
        ({"modes": "residual"}, stg.SettingError, r"modes='residual': expected a list"),
        ({"modes": ["rezidual"]}, stg.SettingError, r"Did you mean 'residual'"),
        ({"seeds": 0}, stg.SettingError, r"seeds=\[\]"),
        ({"stale_after": 0}, stg.SettingError, r"stale_after=0"),
        ({"metrics": [3]}, stg.TargetError, r"metrics: 3 is not callable"),
        ({"metrics": [lambda video, prompt: 1.0]}, stg.SettingError, r"a function has no name"),
        ({"metrics": {"motion": len}}, stg.SettingError, r"the name 'motion' is taken by another metric"),
    ],
)
def test_refused_before_anything_is_made(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Toy().sweep(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompts": ["red 3 blue 7", "purple cat"]}, "refused this call: 'purple cat' cannot be drawn"),
        ({"height": "abc"}, "WanPipeline refused this call"),
        ({"heigth": 32}, "heigth: WanPipeline has no such argument. Did you mean 'height'"),
    ],
)
def test_what_a_pipeline_refuses_is_known_before_the_folder_is_taken(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    settings: dict[str, Any] = {"prompts": demo.PROMPTS[0], "layers": [2], "scales": [1.0], "num_inference_steps": 1}
    pipe = demo.load()
    before = torch.get_rng_state()
    with pytest.raises(stg.SettingError, match=re.escape(text)):
        stg.sweep(pipe, out=tmp_path / "out", progress=False, **{**settings, **changes})
    assert not (tmp_path / "out").exists()
    assert torch.equal(torch.get_rng_state(), before)
    assert not pipe.transformer._forward_pre_hooks


def test_a_pipelines_own_sample_says_what_it_takes(tmp_path: Path) -> None:
    pipe = demo.load()

    def own(prompt: str, generator: torch.Generator, length: int = 1) -> Tensor:
        return demo.sample(pipe, prompt, generator, num_inference_steps=length)

    pipe.stg_sample = own
    arguments: dict[str, Any] = {"layers": [2], "scales": [1.0], "progress": False}
    with pytest.raises(stg.SettingError, match=r"lenght: WanPipeline has no such argument\. Did you mean 'length'"):
        stg.sweep(pipe, demo.PROMPTS[0], out=tmp_path, **arguments, lenght=1)
    assert not stg.sweep(pipe, demo.PROMPTS[0], out=tmp_path, **arguments, length=1).failed


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(stg.ExtraError, match="pip install numpy pillow imageio imageio-ffmpeg tqdm") as caught:
        Toy().sweep(tmp_path)
    assert isinstance(caught.value, ImportError)
    assert not any(tmp_path.iterdir())


# --- frames and metrics ---------------------------------------------------------------------------------------------


def frames(count: int, height: int, width: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


class Output:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


def test_frames_of_whatever_pipelines_return() -> None:
    video = frames(5, 4, 6)
    floats = video.astype(np.float32) / 255
    pictures = [Image.fromarray(frame) for frame in video]
    for output in (
        video,
        floats,
        torch.tensor(video),
        torch.tensor(floats)[None],
        torch.tensor(floats).permute(0, 3, 1, 2)[None],
        pictures,
        Output(frames=[pictures]),
        Output(frames=floats[None]),
        (floats[None],),
    ):
        assert np.array_equal(media.frames_of(output), video)
    for output in (Output(images=[pictures[0]]), Output(images=floats[:1]), pictures[0], torch.tensor(floats[0])):
        assert np.array_equal(media.frames_of(output), video[:1])


def test_an_mp4_holds_what_was_written(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    ramp = np.linspace(0, 255, 96)[None, :, None] * np.ones((64, 1, 3))
    video = np.stack([np.roll(ramp, 8 * i, axis=1) for i in range(6)]).astype(np.uint8)
    name = media.write_sample(tmp_path, "p0-s0", video, fps=8)
    assert name == "p0-s0.mp4"
    read = np.stack(imageio.mimread(tmp_path / name))
    assert read.shape == video.shape
    assert np.abs(read.astype(int) - video).mean() < 4


def test_videos_without_ffmpeg_are_whole_too(tmp_path: Path) -> None:
    video = frames(4, 12, 10)
    name = media.write_sample(tmp_path, "p0-s0", video, fps=8)
    assert name == "p0-s0.webp"
    with Image.open(tmp_path / name) as image:
        for i, frame in enumerate(video):
            image.seek(i)
            assert np.array_equal(np.asarray(image.convert("RGB")), frame)


@pytest.mark.parametrize(
    ("count", "height", "width", "expected"),
    [(20, 10, 12, (16, 12, 10)), (3, 100, 320, (3, 160, 50)), (1, 400, 200, (1, 80, 160))],
)
def test_strips(tmp_path: Path, count: int, height: int, width: int, expected: tuple[int, int, int]) -> None:
    name, *size = media.write_strip(tmp_path, "p0-s0", frames(count, height, width))
    assert (name, *size) == ("p0-s0.strip.webp", *expected)
    with Image.open(tmp_path / name) as strip:
        assert strip.size == (expected[0] * expected[1], expected[2])


def test_metrics_of_known_pictures() -> None:
    still = np.full((4, 8, 8, 3), 0.5, dtype=np.float32)
    assert metrics.contrast(still) == pytest.approx(0.0, abs=1e-6)
    assert metrics.sharpness(still) == metrics.saturation(still) == metrics.clipped(still) == 0.0
    assert metrics.flicker(still) == metrics.motion(still) == 0.0
    halves = still.copy()
    halves[:, :, :4], halves[:, :, 4:] = 0.0, 1.0
    assert metrics.contrast(halves) == pytest.approx(0.5, abs=1e-6)
    assert metrics.clipped(halves) == 1.0
    assert metrics.sharpness(halves) > 0.1
    assert metrics.saturation(halves) == 0.0
    red = np.zeros((1, 4, 4, 3), dtype=np.float32)
    red[..., 0] = 0.8
    red[..., 1:] = 0.2
    assert metrics.saturation(red) == pytest.approx(0.75)
    assert metrics.flicker(red) is metrics.motion(red) is None
    moving = np.stack([np.roll(halves[0], i, axis=1) for i in range(4)])
    assert metrics.flicker(moving) == pytest.approx(0.0, abs=1e-6)
    assert metrics.motion(moving) == pytest.approx(2 / 8, abs=1e-6)
    blinking = still * np.array([1.0, 0.5, 1.0, 0.5], dtype=np.float32)[:, None, None, None]
    assert metrics.flicker(blinking) == pytest.approx(0.25, abs=1e-6)
    assert metrics.difference(still, blinking) == pytest.approx(0.125)
    assert metrics.difference(still, still[:2]) is None
