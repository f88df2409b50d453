"""Where a `with` is in force: in its own thread or task, or in the whole process; calls from elsewhere are reported."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import pickle
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import pipelines, zoo

close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def model() -> Iterator[nn.Module]:
    model = zoo.build("plain")
    before = zoo.snapshot(model)
    yield model
    assert zoo.snapshot(model) == before


@pytest.fixture
def wan() -> Iterator[tuple[Any, dict[str, Any]]]:
    pipe, call, _ = pipelines.build("wan")
    pipelines.run(pipe, call)  # which leaves something on the pipeline and the model
    before = zoo.snapshot(pipe.transformer), dict(vars(pipe))
    yield pipe, call
    assert (zoo.snapshot(pipe.transformer), dict(vars(pipe))) == before


def elsewhere(work: Callable[[], Tensor]) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def guided_and_plain(model: nn.Module) -> tuple[Tensor, Tensor]:
    plain = model(**zoo.inputs())
    return 2 * plain - zoo.without(model, ["blocks.2"])(**zoo.inputs()), plain


def unet_pipeline() -> tuple[Any, dict[str, Any]]:
    """Make a pipeline whose scheduler keeps nothing from step to step, so that threads may run it at once."""
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    pipe = diffusers.StableDiffusionPipeline(
        unet=zoo.FAMILIES["unet2d"].build(), scheduler=scheduler, requires_safety_checker=False, **absent
    )
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(1))
    call = {
        "prompt_embeds": text[0], "negative_prompt_embeds": text[1], "height": 64, "width": 64,
        "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)),
        "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    return pipe, call


# --- a web server -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """Serve an app on loopback, as uvicorn does it; give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline and thread.is_alive():
            time.sleep(0.02)
        assert server.started
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def get(address: str) -> Tensor:
    with urllib.request.urlopen(address, timeout=60) as response:
        return torch.frombuffer(bytearray(response.read()), dtype=torch.float32)


def packed(video: Tensor) -> bytes:
    return bytes(video.contiguous().flatten().view(torch.uint8).tolist())


def app_of(pipe: Any, call: dict[str, Any], **settings: Any) -> Starlette:
    """Make an app that enters guidance when it starts, or when a stream begins."""
    one_at_a_time = threading.Barrier(3, timeout=30)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        with stg.apply(pipe, layers=[0], scale=1.5, **settings):
            pipe(**call)
            yield

    def one(request: Request) -> Response:
        if "together" in request.query_params:
            one_at_a_time.wait()
        with torch.no_grad():
            return Response(packed(pipe(**call)[0]))

    return Starlette(routes=[Route("/", one)], lifespan=lifespan)


def test_a_server_that_enters_at_its_start() -> None:
    pipe, call = unet_pipeline()
    with stg.apply(pipe, layers=[0], scale=1.5):
        guided = pipe(**call)[0].flatten()
    with serving(app_of(pipe, call, scope="process", strict=True)) as address, ThreadPoolExecutor(3) as pool:
        for video in pool.map(get, [f"{address}/?together=1"] * 6):
            assert_close(video, guided, **close)


def test_a_server_that_enters_at_its_start_in_the_default_scope() -> None:
    pipe, call = unet_pipeline()
    plain = pipe(**call)[0].flatten()
    with pytest.warns(stg.StgWarning, match="scope='process'") as seen, serving(app_of(pipe, call)) as address:  # noqa: PT031
        assert_close(get(address), plain, **close)
        assert_close(get(address), plain, **close)
    assert len([one for one in seen if one.category is stg.StgWarning]) == 1
    with serving(app_of(pipe, call, strict=True)) as address, pytest.raises(urllib.error.HTTPError):
        get(address)


def test_a_stream(wan: tuple[Any, dict[str, Any]]) -> None:
    pipe, call = wan
    with stg.apply(pipe, layers=[1]):
        guided = pipelines.run(pipe, call).flatten()

    def items(**settings: Any) -> Iterator[bytes]:
        with torch.no_grad(), stg.apply(pipe, layers=[1], **settings):
            for _ in range(3):
                yield packed(pipelines.run(pipe, call))

    def stream(request: Request) -> Response:
        return StreamingResponse(items(scope="process", strict=True))

    with serving(Starlette(routes=[Route("/", stream)])) as address:
        assert_close(get(address), guided.repeat(3), **close)

    async def collect(**settings: Any) -> list[bytes]:
        return [item async for item in iterate_in_threadpool(items(**settings))]

    with pytest.raises(stg.CallError, match="another thread"):
        asyncio.run(collect(strict=True))
    with pytest.warns(stg.StgWarning, match="another thread"):
        asyncio.run(collect())


# --- without one ------------------------------------------------------------------------------------------------------


def test_process_scope_of_a_module(model: nn.Module) -> None:
    guided, plain = guided_and_plain(model)
    weak = zoo.without(model, ["blocks.2"])(**zoo.inputs())
    with stg.apply(model, [2], scope="process", strict=True):
        assert_close(elsewhere(lambda: model(**zoo.inputs())), guided, **close)
        assert_close(model(**zoo.inputs()), guided, **close)
    with stg.skip(model, [2], scope="process", strict=True), ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: model(**zoo.inputs()), range(12)):
            assert_close(found, weak, **close)
    assert torch.equal(elsewhere(lambda: model(**zoo.inputs())), plain)


def test_unknown_scope(model: nn.Module) -> None:
    for make in (stg.apply, stg.skip):
        with pytest.raises(
            stg.SettingError, match=r"unknown scope='proces'; choose from 'context', 'process'\. Did you mean"
        ):
            make(model, [2], scope="proces")


@pytest.mark.parametrize("make", [stg.apply, stg.skip])
def test_a_module_that_is_called_elsewhere_only(make: Any, model: nn.Module) -> None:
    with pytest.warns(stg.StgWarning, match=r"2 calls .* other threads.*scope='process'"), make(model, [2]):  # noqa: PT031
        elsewhere(lambda: model(**zoo.inputs()))
        elsewhere(lambda: model(**zoo.inputs()))
    with pytest.raises(stg.CallError, match="scope='process'"), make(model, [2], strict=True):
        elsewhere(lambda: model(**zoo.inputs()))


@pytest.mark.parametrize("make", [stg.apply, stg.skip])
def test_a_generator_that_moves_between_contexts(make: Any, model: nn.Module) -> None:
    """It is guided before its first `yield`, plain afterwards, and ends elsewhere than it began."""
    before = zoo.snapshot(model)

    def items() -> Iterator[Tensor]:
        with make(model, [2], strict=True):
            for _ in range(3):
                yield model(**zoo.inputs())

    one = items()
    for _ in range(3):
        Context().run(next, one)
    with pytest.raises(stg.CallError, match=r"2 calls .*scope='process'"):
        Context().run(next, one)
    assert zoo.snapshot(model) == before


@pytest.mark.parametrize("scope", ["context", "process"])
def test_left_in_another_thread(scope: str, model: nn.Module) -> None:
    guided, plain = guided_and_plain(model)
    handle = stg.apply(model, [2], scope=scope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stg.StgWarning)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(handle.__enter__).result()
        handle.__exit__(None, None, None)
    assert torch.equal(model(**zoo.inputs()), plain)
    with handle:
        assert_close(model(**zoo.inputs()), guided, **close)
    assert torch.equal(model(**zoo.inputs()), plain)


# --- made, and never entered ------------------------------------------------------------------------------------------


def test_never_entered(model: nn.Module) -> None:
    with pytest.warns(stg.StgWarning, match="never entered") as seen:  # noqa: PT031
        stg.apply(model, [2])
        gc.collect()
    assert seen[0].filename == __file__


@pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
def test_what_is_silent(model: nn.Module, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(stg.LayerError):
        stg.apply(model, [99])
    with stg.apply(model, [2]):
        model(**zoo.inputs())
    stg.skip(model, [2])
    gc.collect()
    assert not [one for one in recwarn if one.category is not stg.StgWarning]


def test_copies(model: nn.Module) -> None:
    handle = stg.apply(model, [2])
    for thing in (stg.Guider(model, [2]), stg.skip(model, [2]), handle):
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(stg.TargetError, match=rf"stg\.{type(thing).__name__} cannot be copied .*make stg"):
                make(thing)
    handle.not_to_be_entered()


def test_one_that_a_program_holds_to_its_end_is_reported() -> None:
    code = "import stg_hooks as stg, torch\nfrom tests import zoo\nguide = stg.apply(zoo.DiT(), layers=[1])\n"
    for more, told in (("", 1), ("with guide: pass\n", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code + more],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr.count("was made but never entered") == told
