"""What `make compat` runs in each environment: the installed wheel alone, from an empty folder.

Prints one line of JSON, {"versions": {...}, "checked": [...]}, or fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec

import numpy as np

import fewstep as fs
from fewstep.models import load_model
from fewstep.solvers.run.arrays import Array

# Of CPython 3.11 with NumPy 2.4 and Numba 0.68: float64, 6 steps, VP, seed 0.
RECORDED = {
    "dpmpp_2m": [
        [0.7673523102455134, 0.2800641752691993, -0.04805486760682366],
        [-0.18978171763550283, -0.08082063924407733, -0.13073945833265488],
    ],
    "unipc": [
        [0.8142807893784769, 0.30361963334457653, -0.05146256861137837],
        [-0.20381649159311926, -0.08672768306715695, -0.14045681467151433],
    ],
    "dpmpp_2m_sde": [
        [0.2700106811143287, -0.3672353127680315, 0.07006129964198922],
        [-0.14587838493411887, -0.22453760924554536, 0.11151188994788153],
    ],
}


def network(x: Array, t: Array) -> Array:
    return x / (1.0 + x * x) + t.reshape(-1, 1) / 4096.0


def samples(device: str | None, done: list[str]) -> None:
    """The recorded samples, and the same bits of the naive backend in float32."""
    denoiser = fs.Denoiser(network, fs.VP.linear(), "v")
    for solver, want in RECORDED.items():
        found = fs.sample(denoiser, shape=(2, 3), solver=solver, steps=6, seed=0, dtype="float64", device=device)
        np.testing.assert_allclose(np.asarray(found), want, rtol=0, atol=1e-12)
        fused, naive = (
            fs.sample(denoiser, shape=(2, 3), solver=solver, steps=6, seed=0, backend=backend, device=device)
            for backend in ("numba", "naive")
        )
        np.testing.assert_array_equal(np.asarray(fused), np.asarray(naive))
    done.append("samples" if device is None else "torch samples")


def commands(done: list[str]) -> None:
    for arguments in (["--version"], ["doctor"]):
        subprocess.run([sys.executable, "-m", "fewstep", *arguments], check=True, capture_output=True)
    done.append("doctor")
    if find_spec("typer") is None:
        return
    command = [sys.executable, "-m", "fewstep", "sample", "--model", "ring", "--steps", "12", "--n", "200"]
    subprocess.run([*command, "--out", "ring.npz"], check=True, capture_output=True)
    radii = np.sort(np.linalg.norm(np.load("ring.npz")["x"], axis=1))
    data = np.sort(np.linalg.norm(fs.problems.Mixture.ring().draw(200, seed=1), axis=1))
    np.testing.assert_allclose(radii[10:-10], data[10:-10], atol=0.1)
    done.append("sample")


def digits(done: list[str]) -> None:
    """The shipped network on torch: the nearest class mean of a sample is that of its class."""
    model = load_model("digits")
    labels = model.labels(40)
    drawn = fs.sample(
        model.denoiser(2.0), shape=(40, *model.shape), solver="dpmpp_2m", steps=12, seed=0, cond=model.cond(labels)
    )
    data, classes = model.data(0)
    means = np.stack([data[classes == label].reshape(-1, 64).mean(0) for label in range(10)])
    distances = ((np.asarray(drawn).reshape(-1, 1, 64) - means) ** 2).sum(-1)
    if (distances.argmin(1) == labels).mean() < 0.85:
        raise ValueError("the digits network does not draw the digits that it is asked for")
    done.append("digits")


def drop_in(done: list[str]) -> None:
    """A whole run of a twin, against its parent."""
    import diffusers
    import torch

    from fewstep.bindings import diffusers as twins

    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        parent = getattr(diffusers, name)()
        twin = getattr(twins, name).from_config(parent.config)
        found = []
        for scheduler in (parent, twin):
            scheduler.set_timesteps(6)
            x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t)
                x = scheduler.step(scaled / (1.0 + scaled * scaled), t, x).prev_sample
            found.append(x)
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    done.append("diffusers")


def main() -> None:
    done: list[str] = []
    with contextlib.redirect_stdout(io.StringIO()):
        fs.warmup()
        samples(None, done)
        commands(done)
        if find_spec("torch") is not None:
            samples("cpu", done)
            if find_spec("safetensors") is not None and find_spec("sklearn") is not None:
                digits(done)
        if find_spec("diffusers") is not None:
            drop_in(done)
    packages = ("numpy", "numba", "torch", "diffusers")
    versions = {name: metadata.version(name) for name in packages if find_spec(name) is not None}
    print(json.dumps({"versions": versions, "checked": done}))


if __name__ == "__main__":
    main()
