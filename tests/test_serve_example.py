"""The service of examples/serve on loopback: started, loaded, stopped."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fewstep as fs
from fewstep.models import load_model

for needed in ("torch", "fastapi", "uvicorn", "prometheus_client", "PIL"):
    pytest.importorskip(needed)

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "serve"
SECONDS = 60.0


@pytest.fixture(scope="module")
def app() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_app", FOLDER / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_app"] = module  # pydantic resolves annotations there
    spec.loader.exec_module(module)
    return module


class Service:
    """A running service; `digits` is its engine."""

    def __init__(self, app: ModuleType, **options: int) -> None:
        made: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def make() -> Any:
            made.put(app.Digits(**options))
            self.digits = made.get()
            return self.digits

        import uvicorn

        config = uvicorn.Config(app.create_app(make), host="127.0.0.1", port=0, log_level="warning")
        self.server = uvicorn.Server(config)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        waits_for(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        self.socket.close()

    def connect(self, path: str, ask: object = None, body: bytes | None = None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        if ask is None and body is None:
            connection.request("GET", path)
        else:
            sent = json.dumps(ask).encode() if body is None else body
            connection.request("POST", path, sent, {"content-type": "application/json"})
        return connection

    def fetch(self, path: str, ask: object = None, body: bytes | None = None) -> tuple[int, bytes]:
        connection = self.connect(path, ask, body)
        response = connection.getresponse()
        found = response.status, response.read()
        connection.close()
        return found

    def metric(self, name: str, outcome: str | None = None) -> float:
        labels = {} if outcome is None else {"outcome": outcome}
        return self.digits.engine.metrics.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="module")
def service(app: ModuleType) -> Iterator[Service]:
    running = Service(app)
    yield running
    running.stop()
    assert running.digits.engine.closed


def waits_for(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)), np.float64) / 127.5 - 1.0


def wanted(label: int, seed: int, steps: int, guidance: float) -> np.ndarray:
    """The digit that a lone sampler draws."""
    model = load_model("digits")
    denoiser = model.denoiser(guidance)
    plan = fs.plan("dpmpp_2m", fs.grid(denoiser.process, steps))
    x = fs.Sampler(denoiser, plan, (1, *model.shape))(seed=seed, cond=model.cond(np.array([label])))
    return np.asarray(x[0, 0].clamp(-1.0, 1.0))


def test_an_image_is_that_of_a_lone_sampler(service: Service) -> None:
    status, png = service.fetch("/images", {"label": 3, "seed": 5, "steps": 12, "guidance": 3.0, "zoom": 4})
    assert status == 200
    found = pixels(png)
    assert found.shape == (32, 32)
    # A grey level is 1/127.5; a batch of another size rounds the network differently by far less.
    np.testing.assert_allclose(found[::4, ::4], wanted(3, 5, 12, 3.0), atol=0.5 / 127.5 + 1e-4)


def test_many_clients_at_once_get_their_own(service: Service) -> None:
    asks = [{"label": i % 10, "seed": i, "steps": 4 + i % 9, "zoom": 1} for i in range(40)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda ask: service.fetch("/images", ask), asks))
    for ask, (status, png) in zip(asks, answers, strict=True):
        assert status == 200
        want = wanted(ask["label"], ask["seed"], ask["steps"], 2.0)
        np.testing.assert_allclose(pixels(png), want, atol=0.5 / 127.5 + 1e-4)
    occupancy = service.metric("fewstep_occupancy_sum") / service.metric("fewstep_ticks_total")
    assert occupancy > 2 / 8  # they did share calls


def read_events(response: http.client.HTTPResponse) -> list[tuple[str, dict[str, Any]]]:
    lines = response.read().decode().split("\n\n")
    found = []
    for block in filter(None, lines):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_previews_come_before_the_image(service: Service) -> None:
    connection = service.connect("/images/stream", {"label": 8, "seed": 2, "steps": 6, "zoom": 1})
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response)
    connection.close()
    assert [name for name, _ in events] == ["preview"] * 6 + ["image"]
    assert [data["call"] for _, data in events[:-1]] == [1, 2, 3, 4, 5, 6]
    shown = [pixels(base64.b64decode(data["png"])) for _, data in events]
    want = wanted(8, 2, 6, 2.0)
    np.testing.assert_allclose(shown[-1], want, atol=0.5 / 127.5 + 1e-4)
    # The x0 predictions approach the image.
    distances = [float(np.abs(x0 - want).mean()) for x0 in shown[:-1]]
    assert distances[0] > 3.0 * distances[-1]


@pytest.mark.parametrize("path", ["/images", "/images/stream"])
def test_a_client_that_goes_away_gives_its_place_up(service: Service, path: str) -> None:
    before = service.metric("fewstep_requests_total", "cancelled")
    network = service.digits.engine._loop.run.denoiser.model
    slow = network.register_forward_pre_hook(lambda module, args: time.sleep(0.05))
    try:
        connection = service.connect(path, {"label": 1, "steps": 20})
        if path.endswith("stream"):
            connection.getresponse().read(20)  # of the first preview
        else:
            waits_for(lambda: service.digits.engine.active == 1)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        waits_for(lambda: service.metric("fewstep_requests_total", "cancelled") == before + 1)
        waits_for(lambda: service.digits.engine.active == 0)
    finally:
        slow.remove()
    assert service.fetch("/images", {"label": 1})[0] == 200


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        ({"label": 10}, "label"),
        ({"label": "3"}, "label"),
        ({}, "label"),
        ({"label": 1, "steps": 1000}, "steps"),
        ({"label": 1, "guidance": 1e9}, "guidance"),
        ({"label": 1, "guidance": float("nan")}, "guidance"),
        ({"label": 1, "guidance": float("inf")}, "guidance"),
        ({"label": 1, "seed": -1}, "seed"),
        ({"label": 1, "zoom": 4096}, "zoom"),
        ({"label": 1, "extra": 1}, "extra"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_input_has_limits(service: Service, ask: object, field: str) -> None:
    before = service.metric("fewstep_queue_seconds_count")
    status, body = service.fetch("/images", ask)
    assert status == 422
    assert field in body.decode()
    assert service.metric("fewstep_queue_seconds_count") == before  # none got a place


def test_bodies_have_limits(service: Service) -> None:
    assert service.fetch("/images", body=b"x" * 5000)[0] == 413
    assert service.fetch("/images", body=b"{not json")[0] == 422
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=SECONDS)
    connection.request("POST", "/images", iter([b"[" * 1000] * 9), {"content-type": "application/json"})  # chunked
    assert connection.getresponse().status == 413
    connection.close()


def test_health_and_metrics(service: Service) -> None:
    status, body = service.fetch("/health")
    assert status == 200
    assert json.loads(body) == {"running": True, "active": 0, "waiting": 0}
    status, body = service.fetch("/metrics")
    assert status == 200
    lines = body.decode().splitlines()
    assert "fewstep_places 8.0" in lines
    finished = service.metric("fewstep_requests_total", "finished")
    assert f'fewstep_requests_total{{outcome="finished"}} {finished}' in lines


def test_a_full_queue_says_so_and_a_stop_ends_everything(app: ModuleType) -> None:
    running = Service(app, places=1, waiting=1)
    network = running.digits.engine._loop.run.denoiser.model
    network.register_forward_pre_hook(lambda module, args: time.sleep(0.05))
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: running.fetch("/images", {"label": i, "steps": 10})[0], range(6)))
        assert set(answers) == {200, 503}
        late = [pool.submit(running.fetch, "/images", {"label": 0, "steps": 20})]
        waits_for(lambda: running.digits.engine.active == 1)
        late.append(pool.submit(running.fetch, "/images", {"label": 1, "steps": 20}))
        waits_for(lambda: running.digits.engine.waiting == 1)
        running.digits.engine.close()
        assert running.fetch("/health")[0] == 503
        assert [one.result(SECONDS)[0] for one in late] == [500, 500]
    running.stop()


RAY = """
import sys
sys.path.insert(0, {folder!r})
import ray
from ray import serve
ray.init(
    num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
    runtime_env={{"working_dir": {folder!r}}},
)
import ray_app
serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
handle = serve.run(ray_app.Service.options(num_replicas=2, ray_actor_options={{"num_cpus": 0.5}}).bind())
import json, urllib.request, urllib.error
asks = [dict(label=i % 10, seed=i, steps=6, zoom=1) for i in range(24)]
found = [one.result() for one in [handle.sample.remote(**ask) for ask in asks]]
def post(ask):
    sent = urllib.request.Request("http://127.0.0.1:{port}/", json.dumps(ask).encode())
    try:
        with urllib.request.urlopen(sent) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
import numpy as np
status, png = post(asks[3])
assert status == 200 and png.startswith(b"\\x89PNG"), (status, png)
assert post(dict(label=99))[0] == 422
np.save({out!r}, np.stack(found))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
def test_the_same_engine_on_a_ray_cluster(tmp_path: Path) -> None:
    """Two replicas on a local cluster, by handle and by HTTP; the samples are those of lone samplers."""
    pytest.importorskip("ray")
    pytest.importorskip("ray.serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = RAY.format(folder=str(FOLDER), port=port, out=str(tmp_path / "found.npy"))
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = np.load(tmp_path / "found.npy")
    for i in (0, 7, 23):
        np.testing.assert_allclose(np.clip(found[i, 0], -1, 1), wanted(i % 10, i, 6, 2.0), atol=1e-4)
