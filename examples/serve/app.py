"""An image service on `fewstep.Engine`: the digits network behind FastAPI.

    pip install 'fewstep[serve,torch,cli]'
    python examples/serve/app.py --port 8000

    curl -X POST localhost:8000/images -H 'content-type: application/json' -d '{"label": 7, "seed": 1}' -o seven.png
    curl -N -X POST localhost:8000/images/stream -H 'content-type: application/json' -d '{"label": 7, "steps": 20}'

    POST /images         a PNG
    POST /images/stream  server-sent events: "preview" after each call of the network, then "image", or "error"
    GET /health          200 while the engine runs, else 503
    GET /metrics         for Prometheus

A client that goes away gives its place up after the stage that is running. A full queue answers 503 at once, and a
request that got no place in time 504. To serve another network, replace `make_engine` and the limits of `Ask`.
"""

import argparse
import asyncio
import base64
import io
import json
import queue
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import fewstep as fs
from fewstep.models import load_model

STEPS = range(4, 21)
PLACES, WAITING = 8, 64
PATIENCE = 10.0  # seconds in the queue
LARGEST_BODY = 4096  # bytes

T = TypeVar("T")


class Ask(BaseModel):
    """What a client may ask for; everything else is refused with 422 before it reaches the engine."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: Annotated[int, Field(ge=0, le=9)]
    steps: Annotated[int, Field(ge=STEPS.start, le=STEPS[-1])] = 10
    guidance: Annotated[float, Field(ge=1.0, le=8.0)] = 2.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(default_factory=lambda: secrets.randbits(32))
    zoom: Annotated[int, Field(ge=1, le=32)] = 8


class Digits:
    """The engine, and how a request becomes its arguments."""

    def __init__(self, places: int = PLACES, waiting: int = WAITING) -> None:
        model = load_model("digits")
        denoiser = model.denoiser(2.0)
        self.plans = {steps: fs.plan("dpmpp_2m", fs.grid(denoiser.process, steps)) for steps in STEPS}
        self.engine = fs.Engine(
            denoiser, (places, *model.shape), list(self.plans.values()), queue=waiting, previews=True, metrics=True
        )

    async def sample(self, ask: Ask, preview: Callable[[int, int, torch.Tensor], None] | None = None) -> torch.Tensor:
        return await self.engine.asubmit(
            self.plans[ask.steps],
            seed=ask.seed,
            cond={"label": torch.tensor([ask.label])},
            guidance=ask.guidance,
            deadline=PATIENCE,
            preview=preview,
            block=False,
        )


def png(x: torch.Tensor, zoom: int) -> bytes:
    """A grey image (1, H, W) in -1 .. 1."""
    grey = (x[0].clamp(-1.0, 1.0) * 127.5 + 127.5).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(grey).resize((zoom * grey.shape[1], zoom * grey.shape[0]), Image.Resampling.NEAREST).save(
        file, "PNG"
    )
    return file.getvalue()


class LimitBody:
    """Refuses larger request bodies, also those that do not say their length."""

    def __init__(self, app: ASGIApp, largest: int) -> None:
        self.app, self.largest = app, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.largest:
                raise HTTPException(413, f"the body is larger than {self.largest} bytes")
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.largest:
            await Response(f"the body is larger than {self.largest} bytes", 413)(scope, receive, send)
            return
        await self.app(scope, limited, send)


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, which is cancelled when the client disconnects: None then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()


def refusal(error: Exception) -> HTTPException:
    """The answer to a request that the engine did not take, or not in time."""
    if isinstance(error, queue.Full):
        return HTTPException(503, "the queue is full", headers={"retry-after": "1"})
    if isinstance(error, TimeoutError):
        return HTTPException(504, f"no place within {PATIENCE:g} s")
    return HTTPException(500, "the sample failed")


def create_app(make: Callable[[], Digits] = Digits) -> FastAPI:
    """The service. `make` is called at start-up; the engine is closed at shutdown."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.digits = make()
        yield
        await asyncio.to_thread(app.state.digits.engine.close)

    app = FastAPI(title="fewstep digits", lifespan=lifespan)
    app.add_middleware(LimitBody, largest=LARGEST_BODY)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # without the input: Python's parser takes NaN and Infinity, which no JSON answer can repeat
        return JSONResponse({"detail": [{key: e[key] for key in ("type", "loc", "msg")} for e in error.errors()]}, 422)

    @app.post("/images", response_class=Response)
    async def image(ask: Ask, request: Request) -> Response:
        try:
            x = await unless_gone(request, app.state.digits.sample(ask))
        except Exception as error:
            raise refusal(error) from error
        if x is None:
            return Response(status_code=499)  # nobody reads it
        return Response(png(x, ask.zoom), media_type="image/png", headers={"x-seed": str(ask.seed)})

    @app.post("/images/stream")
    async def stream(ask: Ask) -> StreamingResponse:
        return StreamingResponse(events(app.state.digits, ask), media_type="text/event-stream")

    @app.get("/health")
    async def health(response: Response) -> dict[str, Any]:
        engine = app.state.digits.engine
        response.status_code = 503 if engine.closed else 200
        return {"running": not engine.closed, "active": engine.active, "waiting": engine.waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(app.state.digits.engine.metrics), media_type=CONTENT_TYPE_LATEST)

    return app


async def events(digits: Digits, ask: Ask) -> AsyncIterator[str]:
    """Server-sent events of one request. When the client disconnects, the generator is closed, and cancels it."""
    loop = asyncio.get_running_loop()
    seen: asyncio.Queue[tuple[int, int, torch.Tensor] | None] = asyncio.Queue()

    def preview(call: int, calls: int, x0: torch.Tensor) -> None:  # on the engine's thread: hand over and return
        loop.call_soon_threadsafe(seen.put_nowait, (call, calls, x0))

    task = asyncio.ensure_future(digits.sample(ask, preview))
    task.add_done_callback(lambda _: seen.put_nowait(None))
    try:
        while (found := await seen.get()) is not None:
            call, calls, x0 = found
            yield event("preview", call=call, calls=calls, png=png(x0, ask.zoom))
        try:
            yield event("image", seed=ask.seed, png=png(task.result(), ask.zoom))
        except Exception as error:
            refused = refusal(error)
            yield event("error", status=refused.status_code, detail=refused.detail)
    finally:
        task.cancel()


def event(name: str, **data: Any) -> str:
    if "png" in data:
        data["png"] = base64.b64encode(data["png"]).decode()
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(create_app(), host=arguments.host, port=arguments.port)
