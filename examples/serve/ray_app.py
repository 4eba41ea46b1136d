"""The same engine on more than one machine: a Ray Serve deployment, one engine per replica.

    pip install 'ray[serve]'
    cd examples/serve && serve run --working-dir . ray_app:app    # on a machine of the cluster

Every machine needs fewstep; Ray sends this folder along.

    curl -X POST localhost:8000/ -H 'content-type: application/json' -d '{"label": 7, "seed": 1}' -o seven.png

Ray starts `replicas` engines wherever the cluster has room, sends each request to one of the two replicas that have
fewer requests (it picks the two at random), and restarts a replica that fails its health check. A sample depends on its
own seed alone, so that it does not matter which replica drew it. Inside the cluster, call `handle.sample.remote(...)`.
"""

from typing import Any

import numpy as np
from app import PLACES, WAITING, Ask, Digits, png, refusal
from fastapi import HTTPException
from pydantic import ValidationError
from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response


@serve.deployment(num_replicas=2, max_ongoing_requests=PLACES + WAITING, health_check_period_s=10.0)
class Service:
    def __init__(self) -> None:
        self.digits = Digits()

    def check_health(self) -> None:
        if self.digits.engine.closed:
            raise RuntimeError("the engine has ended")

    async def sample(self, **ask: Any) -> np.ndarray:
        """(1, 8, 8) in -1 .. 1. Raises pydantic's ValidationError, queue.Full or TimeoutError."""
        sample: np.ndarray = (await self.digits.sample(Ask(**ask))).numpy()
        return sample

    async def __call__(self, request: Request) -> Response:
        try:
            ask = Ask.model_validate_json(await request.body())
        except ValidationError as error:
            return PlainTextResponse(str(error), 422)
        try:
            return Response(png(await self.digits.sample(ask), ask.zoom), media_type="image/png")
        except Exception as error:
            refused: HTTPException = refusal(error)
            return PlainTextResponse(str(refused.detail), refused.status_code)


app = Service.bind()  # type: ignore[attr-defined]
