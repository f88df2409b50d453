"""Sample a grid of settings with the same seeds into a folder that reports read; interrupted runs go on."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from stg_hooks.apply import apply
from stg_hooks.errors import SettingError, warn
from stg_hooks.hosts import denoisers_of
from stg_hooks.model.resolve import LayerSpec
from stg_hooks.study import claims, media
from stg_hooks.study import metrics as measures
from stg_hooks.study.cost import CallCounter
from stg_hooks.study.results import (
    BASELINE,
    CELL_FILE,
    CELLS,
    SETTINGS_FILE,
    SWEEP_FILE,
    VERSION,
    Cell,
    Place,
    Sample,
    Sweep,
    cell_id,
    grid,
    mean,
    read_json,
    settings_of,
    write_json,
)
from stg_hooks.study.sampling import Sample as Sampler
from stg_hooks.study.sampling import generator_of, rehearse, sampler_of
from stg_hooks.study.sweep_settings import asked_of, call_text, check_same, code_of

_CLAIMS = "claims"
_PARTIAL = "partial"
_FLOPS_FILE = "flops.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_POLL = 0.5  # seconds between two looks at what other processes are doing


def sweep(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    out: str | os.PathLike[str],
    layers: Iterable[LayerSpec] | None = None,
    scales: Iterable[float] = (0.5, 1.0),
    modes: Iterable[str] = ("residual",),
    seeds: int | Iterable[int] = 1,
    metrics: Mapping[str, measures.Metric] | Sequence[measures.Metric] | measures.Metric | None = None,
    sample: Sampler | None = None,
    fps: int = 8,
    progress: bool = True,
    stale_after: float = 300.0,
    **settings: Any,
) -> Sweep:
    """Sample every combination of layers, modes and scales, and the plain pipeline, from the same noise.

    Each finished cell (one combination, all prompts and seeds) is on disk at once. Called again with the same settings
    and folder, also after it was killed, a sweep goes on where it stopped, and tries failed cells once more. Any number
    of processes on any number of machines may run the same sweep on one common folder: each takes cells that
    no other has taken, and returns when all of them are made. A cell's folder holds its samples and `settings.json`:
    `stg.apply(pipe, **json.load(file))`, or `stg-hooks generate MODEL --settings FILE`.

    Args:
        pipe: a diffusers pipeline, or a module, with `sample`.
        prompts: one or several.
        out: the folder.
        layers: what to skip in each column of the grid: an index or name, or a list of those, skipped together. Left
            out, every numbered layer by itself.
        scales: the weights of `cond - weak`.
        modes: what skipped layers do instead.
        seeds: how many, from 0 on; or which.
        metrics: functions of `(video, prompt)` that return a number, by name or as a list, beside those of
            `stg_hooks.study.metrics`. The video is a numpy array `(F, H, W, 3)`, float32 from 0 to 1.
        sample: a function of `(prompt, generator)` that makes one sample, instead of `pipe(prompt=, generator=)`.
        fps: frames per second of the videos that are written.
        progress: show a progress bar.
        stale_after: seconds without a sign of life from another process after which its cell is taken over.
        **settings: further arguments of the pipeline, such as `num_inference_steps`.

    Returns:
        What was asked for and all cells; print it for a table.

    Raises:
        ExtraError: a package is missing; says what to install.
        LayerError: a layer that does not exist or cannot be skipped in one of the modes.
        ResultsError: the folder holds a sweep with other settings; says which.
        SettingError: a setting that cannot be used, or a call that the pipeline refuses.
        TargetError: a target whose calls cannot be guided, or that makes no pictures.
    """
    media.needs("numpy", "PIL.Image", "imageio", "tqdm")
    if not stale_after > 0:
        raise SettingError(f"stale_after={stale_after!r}: expected a number of seconds above 0.")
    make = sampler_of(pipe, sample, settings, "np")
    own = measures.own_metrics(metrics)
    asked = asked_of(pipe, prompts, layers, scales, modes, seeds, settings, fps, own, sample)
    for place in grid(asked):
        if place[0]:
            _guidance(pipe, place).not_to_be_entered()  # all of them can be made, or none is
    if sample is None:
        rehearse(pipe, make, asked["prompts"])
    run = _Run(pipe, make, own, Path(out), asked, call_text(pipe, sample, settings), stale_after)
    run.open()
    run.all_cells(progress)
    return Sweep.load(out)


class _Run:
    """One process's part in a sweep."""

    def __init__(
        self,
        pipe: Any,
        make: Sampler,
        own: Mapping[str, measures.Metric],
        out: Path,
        asked: Mapping[str, Any],
        call: str,
        stale_after: float,
    ) -> None:
        self._pipe, self._make, self._own, self._out = pipe, make, own, out
        self._asked, self._call, self._stale_after = asked, call, stale_after
        self._places = {cell_id(*place): place for place in grid(asked)}
        self._claims = out / _CLAIMS
        self._finished: set[str] = set()

    def open(self) -> None:
        """Write what the sweep is, or check that the folder holds the same one; clear away what killed runs left."""
        while not (self._out / SWEEP_FILE).exists():
            with claims.claimed(self._claims, SWEEP_FILE, self._stale_after) as claim:
                if claim and not (self._out / SWEEP_FILE).exists():
                    write_json(self._out / SWEEP_FILE, {"kind": "sweep", "version": VERSION, **self._asked})
            time.sleep(0 if claim else 0.05)
        check_same(self._out, read_json(self._out / SWEEP_FILE, "sweep"), self._asked)
        (self._out / CELLS).mkdir(exist_ok=True)
        for rest in (self._out / _PARTIAL).glob("*"):
            if not claims.is_claimed(self._claims, rest.name.rpartition(".")[0], self._stale_after):
                shutil.rmtree(rest, ignore_errors=True)
        # What failed before this run is tried again; what fails in it, here or elsewhere, is not.
        for name in self._places:
            file = self._out / CELLS / name / CELL_FILE
            if file.exists() and Cell.load(file.parent).status == "failed":
                with claims.claimed(self._claims, name, self._stale_after) as claim:
                    if claim:
                        shutil.rmtree(file.parent)

    def all_cells(self, progress: bool) -> None:
        """Make cells until there is none left; wait for those that others are making, in case they stop."""
        from tqdm import tqdm

        per_cell = len(self._asked["prompts"]) * len(self._asked["seeds"])
        self._look()
        done = len(self._finished) * per_cell
        total = len(self._places) * per_cell
        with tqdm(total=total, initial=done, unit="sample", disable=not progress, dynamic_ncols=True) as bar:
            while len(self._finished) < len(self._places):
                made = [self._try(name, bar) for name in self._places if name not in self._finished]
                self._look()
                bar.n = len(self._finished) * per_cell
                bar.refresh()
                if not any(made):
                    time.sleep(_POLL)

    def _look(self) -> None:
        self._finished |= {name for name in self._places if (self._out / CELLS / name / CELL_FILE).exists()}

    def _try(self, name: str, bar: Any) -> bool:
        """Make a cell, unless another process makes it or has made it; tell whether it was made here."""
        folder = self._out / CELLS / name
        with claims.claimed(self._claims, name, self._stale_after) as claim:
            if claim is None or (folder / CELL_FILE).exists():
                return False
            bar.set_description(name)
            partial = self._out / _PARTIAL / f"{name}.{uuid.uuid4().hex}"
            partial.mkdir(parents=True)
            try:
                cell = self._cell(name, partial, bar)
                if cell.layers:
                    write_json(partial / SETTINGS_FILE, cell.settings)
                write_json(partial / CELL_FILE, dataclasses.asdict(cell))
                if claim.holds:
                    shutil.rmtree(folder, ignore_errors=True)  # what a crash while deleting may have left
                    partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        self._finished.add(name)
        return True

    def _cell(self, name: str, folder: Path, bar: Any) -> Cell:
        """Make a cell's samples; an error becomes part of the result."""
        layers, mode, scale = place = self._places[name]
        begun = time.perf_counter()
        samples: list[Sample] = []
        cost, error = None, None
        try:
            with _guidance(self._pipe, place) if layers else nullcontext():
                videos, counter = self._videos(bar)
            if layers:
                self._await_baseline(bar)
                cost = self._cost(counter)
            else:
                write_json(folder / _FLOPS_FILE, {"calls": counter.counts})
            samples = [self._written(folder, i, j, frames, bool(layers)) for (i, j), frames in videos.items()]
        except Exception as reason:
            if isinstance(reason, OSError) and reason.errno in _NO_ROOM:
                raise  # no cell could be kept
            error = " ".join(f"{type(reason).__name__}: {reason}".split())
            for file in folder.iterdir():
                file.unlink()
        names = dict.fromkeys(metric for made in samples for metric in made.metrics)
        return Cell(
            id=name,
            layers=layers,
            mode=mode,
            scale=scale,
            status="failed" if error else "done",
            error=error,
            seconds=time.perf_counter() - begun,
            cost=cost if layers else 0.0,
            metrics={metric: mean(made.metrics.get(metric) for made in samples) for metric in names},
            code=code_of(place, self._call, is_video=not samples or samples[0].frames > 1),
            samples=tuple(samples),
        )

    def _videos(self, bar: Any) -> tuple[dict[tuple[int, int], Any], CallCounter]:
        """Make the samples of a cell, and count the FLOPs of the first calls."""
        videos: dict[tuple[int, int], Any] = {}
        counter = CallCounter(denoisers_of(self._pipe).values())
        for i, prompt in enumerate(self._asked["prompts"]):
            for j, seed in enumerate(self._asked["seeds"]):
                with torch.no_grad(), nullcontext() if videos else counter.installed():
                    output = self._make(prompt, generator_of(seed))
                videos[i, j] = media.frames_of(output)
                bar.update()
        return videos, counter

    def _written(self, folder: Path, i: int, j: int, frames: Any, compare: bool) -> Sample:
        """Write a sample and measure it."""
        (np,) = media.needs("numpy")
        stem = f"p{i}-s{j}"
        video = frames.astype(np.float32) / 255
        prompt = self._asked["prompts"][i]
        found = {name: metric(video, prompt) for name, metric in measures.BUILT_IN.items()}
        found |= {name: _own_number(name, metric, video, prompt) for name, metric in self._own.items()}
        found[measures.DIFFERENCE] = self._difference(stem, video) if compare else 0.0
        if not compare:
            np.savez_compressed(folder / f"{stem}.npz", frames=frames)  # what is played may have lost something
        file = media.write_sample(folder, stem, frames, self._asked["fps"])
        strip = media.write_strip(folder, stem, frames)
        return Sample(i, j, file, *strip, found)

    def _await_baseline(self, bar: Any) -> None:
        """Wait until the plain pipeline's samples are there; make them, unless another process does."""
        while not (self._out / CELLS / BASELINE / CELL_FILE).exists():
            if not self._try(BASELINE, bar):
                time.sleep(_POLL)

    def _difference(self, stem: str, video: Any) -> float | None:
        (np,) = media.needs("numpy")
        file = self._out / CELLS / BASELINE / f"{stem}.npz"
        if not file.exists():  # the baseline failed
            return None
        with np.load(file) as data:
            return measures.difference(video, data["frames"].astype(np.float32) / 255)

    def _cost(self, counter: CallCounter) -> float | None:
        file = self._out / CELLS / BASELINE / _FLOPS_FILE
        return counter.added_to(read_json(file, None)["calls"]) if file.exists() else None


def _own_number(name: str, metric: measures.Metric, video: Any, prompt: str) -> float | None:
    """Ask a user's metric; samples that it fails on are kept, without its number."""
    try:
        return float(metric(video, prompt))
    except Exception as error:
        warn(f"stg.sweep: the metric {name!r} failed: {type(error).__name__}: {error}")
        return None


def _guidance(pipe: Any, place: Place) -> apply:
    return apply(pipe, **settings_of(place))
