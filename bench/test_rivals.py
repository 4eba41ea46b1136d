"""A whole run beside other ways to write it: k-diffusion's functions, torch by hand, torch.compile.

The network is free; all start from the same latent and must end at the same sample.

k-diffusion is timed where it is installed: pip install --no-deps k-diffusion torchdiffeq
"""

import importlib
import importlib.util
import statistics
import sys
from types import ModuleType
from unittest import mock

import pytest

import fewstep as fs
from fewstep.bindings import k_diffusion as ours_k
from fewstep.cli.timing import Side, clock, has, interleaved

torch = pytest.importorskip("torch")

REPEATS = 40
STEPS = 20
SHAPES = [(1, 4, 8, 8), (1, 4, 64, 64), (1, 4, 128, 128)]


def rival_functions():
    """k-diffusion's module of samplers. Packages that only its training and its Brownian paths need may be absent."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        return None
    package = ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    images = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    absent = [name for name in ("torchsde", "PIL", *images) if not has(name.partition(".")[0])]
    modules = {name: ModuleType(name) for name in absent} | {"k_diffusion": package}
    with mock.patch.dict(sys.modules, modules):
        for name in absent:
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(modules[parent], own, modules[name])
            elif name == "PIL":
                modules[name].Image = None
        return importlib.import_module("k_diffusion.sampling")


def euler(x, x0, ratio, weight):
    """x' = sigma' / sigma x + (1 - sigma' / sigma) x0."""
    return ratio * x + weight * x0


def multistep(x, x0, old, ratio, weight, now, before):
    """DPM-Solver++ 2M: x' = sigma' / sigma x + weight (now x0 + before old), with weight = 1 - e^-h."""
    return ratio * x + weight * (now * x0 + before * old)


def written(solver, sigmas, model, x, update):
    """The loop as a person writes it, with the coefficients as numbers made beforehand."""
    lam = [-float(torch.log(s)) for s in sigmas[:-1]] + [float("inf")]
    coefficients = []
    for i in range(STEPS):
        h = lam[i + 1] - lam[i]
        r = (lam[i] - lam[i - 1]) / h if 0 < i < STEPS - 1 else None
        ratio = float(sigmas[i + 1] / sigmas[i])
        after = (1.0, 0.0) if r is None else (1.0 + 0.5 / r, -0.5 / r)
        coefficients.append([torch.tensor(v) for v in (ratio, 1.0 - ratio, *after)])
    one = torch.ones(len(x))
    levels = [sigma * one for sigma in sigmas[:-1]]

    def run():
        y, old = x, None
        for level, (ratio, weight, now, before) in zip(levels, coefficients, strict=True):
            x0 = model(y, level)
            if solver == "euler":
                y = update(y, x0, ratio, weight)
            else:
                y = update(y, x0, x0 if old is None else old, ratio, weight, now, before)
                old = x0
        return y

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_a_run_beside_other_ways_to_write_it(solver, shape, benchmark, report, one_thread):
    generator = torch.Generator().manual_seed(0)
    process = fs.EDM()
    x, x0 = 80.0 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    grid = fs.grid(process, STEPS, "karras")
    sigmas = torch.tensor(grid.sigma, dtype=torch.float32)

    def model(x_in, t, **_):
        return x0

    # Of a network that returns one array, every loop ends at that array, so the gate takes one that depends on x.
    def gate_model(x_in, t, **_):
        return torch.tanh(x_in / (1.0 + t.reshape(-1, 1, 1, 1)))

    update = euler if solver == "euler" else multistep
    compiled = torch.compile(update, dynamic=False)

    def sides(network):
        sampler = fs.Sampler(fs.Denoiser(network, process, "sample"), fs.plan(solver, grid), shape, device="cpu")
        name = f"sample_{solver}"
        found = {
            "Sampler": lambda: sampler(x),
            "fewstep's k-diffusion name": lambda: getattr(ours_k, name)(network, x, sigmas, disable=True),
            "torch, by hand": written(solver, sigmas, network, x, update),
            "torch.compile": written(solver, sigmas, network, x, compiled),
        }
        rival = rival_functions()
        if rival is not None:
            found["k-diffusion"] = lambda: getattr(rival, name)(network, x, sigmas, disable=True)
        return found

    with torch.no_grad():
        ends = {name: run() for name, run in sides(gate_model).items()}
        for name, end in ends.items():
            torch.testing.assert_close(
                end, ends["torch, by hand"], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        timed = {name: Side(name, run, STEPS).repeated() for name, run in sides(model).items()}
        medians = [1e6 * statistics.median(s) for s in interleaved(list(timed.values()), REPEATS, clock(1))]
    times = dict(zip(timed, medians, strict=True))
    where = f"{solver} {'x'.join(map(str, shape))}"
    mine = times["Sampler"]
    for name, spent in times.items():
        if name != "Sampler":
            report(f"rival {where} beside {name}", mine, spent, spent / mine, None, "us/step")
    benchmark.pedantic(timed["Sampler"].run, rounds=5)
