"""Two ideas for three and four calls, tried on the digits network: `python -m reports.few_calls`.

Coefficients for each sample (AMED-Solver, Zhou et al. 2024): a small network reads the U-Net's bottleneck and predicts
the numbers of the rest of the plan. Parallel calls (EPD-Solver, Zhu et al. 2025): every round but the first calls the
network at two points at once, so that the latency is that of the rounds. Both are compared with one fitted plan for
all samples, by the error to the ODE's end points on latents that no fit saw.

`--latency` times the plans instead: a round of two calls in one call of the U-Net against two in a row.

All are fitted by Gauss-Newton to the same latents. The Jacobian of each sample's end point by its own numbers comes
from difference quotients; the small networks are trained on the linearised error, and the error is made linear anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fewstep as fs
from fewstep.bindings.unet import digits_model
from fewstep.models import load_model
from fewstep.solvers.plans.plan_file import read_plan
from fewstep.solvers.plans.registry import plan as make_plan
from fewstep.solvers.schedule.grid import grid as make_grid
from fewstep.solvers.tune.ensemble import Ensemble, latents, unroll
from fewstep.solvers.tune.parallel import ParallelRule
from fewstep.solvers.tune.study import cache_folder, reference_ends, reference_grid
from fewstep.solvers.tune.tuned import Rule

Array = NDArray[np.float64]

CALLS = 64  # of the ODE solutions, whose error is 0.0005
SEEDS = {"train": 4, "validation": 3, "test": 1}
SIZES = {"train": 384, "validation": 128, "test": 128}
STEP = 2e-3  # of the difference quotients, in float32
DAMPING = (1e-3, 3e-2, 1.0)
HIDDEN = 32
TIE = 0.3  # cost of leaving the numbers around which the error is linear
WIDEST = 512  # samples per call of the network


@dataclass(frozen=True)
class Order:
    """Which predictions each row may read: row k is the input of call k, and the last row the result.

    seen  the number of predictions before row k; two rows with as many belong to parallel calls
    """

    seen: tuple[int, ...]

    @property
    def calls(self) -> int:
        return len(self.seen) - 1

    def numbers(self, row: int) -> slice:
        """Where a row's numbers are: its level, that told to the network and its scale (not in the last),
        and the weights of older calls."""
        sizes = [0] + [3 * (k < self.calls) + self.seen[k] - 1 for k in range(1, self.calls + 1)]
        return slice(sum(sizes[:row]), sum(sizes[: row + 1]))

    @property
    def size(self) -> int:
        return int(self.numbers(self.calls).stop)


def serial(calls: int) -> Order:
    return Order(tuple(range(calls + 1)))


def parallel(rounds: int) -> Order:
    """Rounds of two calls after the first."""
    return Order((0, *(k for r in range(1, rounds) for k in [2 * r - 1] * 2), 2 * rounds - 1))


@dataclass
class Data:
    """Latents, classes and the ODE's end points, (n, 64)."""

    z: Array
    label: Tensor
    target: Array
    first: tuple[Array, Tensor] | None = None  # the first prediction and its features, the same for every plan


def load(name: str, count: int) -> Data:
    model = load_model("digits")
    denoiser = model.denoiser(None)
    ensemble = Ensemble(denoiser, latents(count, model.shape, SEEDS[name]), model.all_classes())
    plan = make_plan("unipc", reference_grid(denoiser, CALLS), order=3)
    ends, _ = reference_ends(ensemble, plan, ("few-calls",), cache_folder())
    return Data(ensemble.z, torch.arange(count) % 10, ends)


@dataclass
class Solver:
    """The network, and plans for each sample: numbers (n, size), of which row k takes its slice."""

    order: Order
    first: float  # log(sigma / alpha) of the first call
    passes: int = 0
    deeper: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.process = load_model("digits").denoiser(None).process
        self.network = digits_model()
        bottleneck = self.network.get_submodule("mid2")
        bottleneck.register_forward_hook(lambda module, given, out: self.deeper.append(out.mean(dim=(2, 3))))

    def predict(self, x: Array, level: Array, label: Tensor) -> tuple[Array, Tensor]:
        """The x0 prediction (n, 64) at each sample's own level, and features: bottleneck and size of the prediction."""
        ratio = np.exp(level)
        alpha = (1.0 / np.hypot(1.0, ratio))[:, None]
        sigma = ratio[:, None] * alpha
        t = torch.from_numpy(np.asarray(self.process.point_at_sigma(ratio)[0])).float()
        given, out = torch.from_numpy(x).float().reshape(-1, 1, 8, 8), []
        self.deeper.clear()
        with torch.no_grad():
            for at in range(0, len(x), WIDEST):
                part = slice(at, at + WIDEST)
                out.append(self.network(given[part], t[part], label[part]).reshape(-1, 64))
        self.passes += len(x)
        found = alpha * x - sigma * torch.cat(out).double().numpy()
        size = torch.from_numpy(np.sqrt(np.mean(found**2, axis=1, keepdims=True))).float()
        return found, torch.cat([torch.cat(self.deeper), size], dim=1)

    def row(self, k: int, numbers: Array, z: Array, predictions: Sequence[Array]) -> tuple[Array, Array]:
        """The input of call k, or the result, and the level that the network is told."""
        own, seen = numbers[:, self.order.numbers(k)], self.order.seen[k]
        alpha, sigma, told = np.ones((len(z), 1)), np.zeros((len(z), 1)), np.empty(0)
        if k < self.order.calls:
            ratio = np.exp(own[:, :1])
            alpha = np.exp(own[:, 2:3]) / np.hypot(1.0, ratio)
            sigma, told, own = ratio * alpha, own[:, 0] + own[:, 1], own[:, 3:]
        x = sigma * z + (alpha - own.sum(axis=1, keepdims=True)) * predictions[seen - 1]
        for j in range(seen - 1):
            x = x + own[:, j : j + 1] * predictions[j]
        return x, told

    def run(
        self, data: Data, numbers: Array, nets: Nets | None = None, latest: bool = True
    ) -> tuple[Array, list[Array], list[Tensor], Array]:
        """The end points, the predictions, their features, and the numbers with what the nets added."""
        if data.first is None:
            level = np.full(len(data.z), self.first)
            sigma = float(np.exp(self.first) / np.hypot(1.0, np.exp(self.first)))
            data.first = self.predict(sigma * data.z, level, data.label)
        predictions, features, numbers = [data.first[0]], [data.first[1]], numbers.copy()
        for k in range(1, self.order.calls + 1):
            if nets is not None:
                numbers[:, self.order.numbers(k)] += nets(k, features[self.order.seen[k] - 1 if latest else 0])
            x, told = self.row(k, numbers, data.z, predictions)
            if k < self.order.calls:
                found, seen = self.predict(x, told, data.label)
                predictions.append(found)
                features.append(seen)
        return x, predictions, features, numbers

    def jacobian(self, data: Data, numbers: Array, predictions: Sequence[Array], end: Array) -> Array:
        """Of each sample's end point by its own numbers, (n, 64, size)."""
        order, out = self.order, np.empty((*end.shape, self.order.size))
        for k in range(1, order.calls + 1):
            for i in range(order.numbers(k).start, order.numbers(k).stop):
                moved, known = numbers.copy(), list(predictions)
                moved[:, i] += STEP
                for later in range(k, order.calls):
                    if later == k or order.seen[later] > k:
                        x, told = self.row(later, moved, data.z, known)
                        known[later] = self.predict(x, told, data.label)[0]
                out[:, :, i] = (self.row(order.calls, moved, data.z, known)[0] - end) / STEP
        return out


class Nets:
    """For each row a small network from features to what is added to the row's numbers; nothing at first."""

    def __init__(self, order: Order, features: Tensor) -> None:
        torch.manual_seed(0)
        self.mean, self.std = features.mean(dim=0), features.std(dim=0) + 1e-6
        self.rows = nn.ModuleList()
        for k in range(1, order.calls + 1):
            own = order.numbers(k)
            last = nn.Linear(HIDDEN, own.stop - own.start)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.rows.append(nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.SiLU(), last))

    def tensor(self, k: int, features: Tensor) -> Tensor:
        out: Tensor = self.rows[k - 1]((features - self.mean) / self.std)
        return out

    def __call__(self, k: int, features: Tensor) -> Array:
        with torch.no_grad():
            return np.asarray(self.tensor(k, features).double().numpy())

    def train(self, features: Sequence[Tensor], jacobian: Array, residual: Array, tie: float, steps: int) -> None:
        """On the linear error, with a cost for leaving the numbers around which it is linear."""
        slopes, error = torch.from_numpy(jacobian).float(), torch.from_numpy(residual).float()
        unit = error.square().sum(dim=1).mean()
        scale = slopes.square().sum(dim=1).mean(dim=0)

        def added() -> Tensor:
            return torch.cat([self.tensor(k, f) for k, f in enumerate(features, 1)], dim=1)

        before = added().detach()
        optimizer = torch.optim.Adam(self.rows.parameters(), lr=3e-3, weight_decay=1e-4)
        for _ in range(steps):
            change = added() - before
            left = error + torch.einsum("nei,ni->ne", slopes, change)
            loss = left.square().sum(dim=1).mean() / unit + tie * (change.square() * scale).sum(dim=1).mean() / unit
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()


def marks(error: Array) -> tuple[float, float]:
    """RMSE and median."""
    squares = np.mean(error**2, axis=1)
    return float(np.sqrt(squares.mean())), float(np.sqrt(np.median(squares)))


def fit_one(solver: Solver, data: Data, numbers: Array, rounds: int) -> Array:
    """One plan for all samples by Levenberg-Marquardt."""
    for _ in range(rounds):
        every = np.tile(numbers, (len(data.z), 1))
        end, predictions, _, _ = solver.run(data, every)
        jacobian = solver.jacobian(data, every, predictions, end)
        flat, residual = jacobian.reshape(-1, jacobian.shape[2]), (end - data.target).ravel()
        square, best = flat.T @ flat, (marks(end - data.target)[0], numbers)
        # A parallel call without weight moves nothing at first.
        own = np.diag(square) + 1e-6 * np.diag(square).max()
        for damping in DAMPING:
            step = np.linalg.solve(square + damping * np.diag(own), flat.T @ residual)
            tried = numbers - step
            with np.errstate(over="ignore", invalid="ignore"):
                score = marks(solver.run(data, np.tile(tried, (len(data.z), 1)))[0] - data.target)[0]
            if score < best[0]:
                best = score, tried
                break
        if best[1] is numbers:
            break
        numbers = best[1]
    return numbers


def fit_each(
    solver: Solver, train: Data, validation: Data, numbers: Array, rounds: int, latest: bool, steps: int
) -> tuple[Nets, float]:
    """Small networks around the plan for all, those of the round that is best on the validation latents."""
    base = np.tile(numbers, (len(train.z), 1))
    around = np.tile(numbers, (len(validation.z), 1))
    end, predictions, features, own = solver.run(train, base)
    nets = Nets(solver.order, torch.cat(features) if latest else features[0])
    kept = nets.rows.state_dict()
    best = marks(solver.run(validation, around)[0] - validation.target)[0]
    print(f"  one plan for all: validation {best:.4f}", flush=True)
    for _ in range(rounds):
        jacobian = solver.jacobian(train, own, predictions, end)
        read = [features[solver.order.seen[k] - 1 if latest else 0] for k in range(1, solver.order.calls + 1)]
        nets.train(read, jacobian, end - train.target, TIE, steps)
        end, predictions, features, own = solver.run(train, base, nets, latest)
        score = marks(solver.run(validation, around, nets, latest)[0] - validation.target)[0]
        print(f"  train {marks(end - train.target)[0]:.4f}, validation {score:.4f}", flush=True)
        if score < best:
            best, kept = score, {name: value.clone() for name, value in nets.rows.state_dict().items()}
    nets.rows.load_state_dict(kept)
    return nets, best


def start(calls: int) -> tuple[float, Array]:
    """The level of the first call and the numbers of the report's plan, or of iPNDM on AYS in three calls."""
    denoiser = load_model("digits").denoiser(None)
    if calls == 3:
        grid = make_grid(denoiser.process, 3, "ays")
        rule = Rule.of("ipndm", {}, grid, "all", True)
        form = unroll(rule.plan(rule.start(grid)))
    else:
        form = unroll(read_plan(f"docs/tuning/digits-{calls}.json"))
    numbers: list[float] = []
    for k in range(1, calls + 1):
        weights = form.w[k, 1 : k + 1]
        if k < calls:
            level = float(np.log(form.w[k, 0] / weights.sum()))
            scale = float(np.log(np.hypot(form.w[k, 0], weights.sum())))
            numbers += [level, float(np.log(form.points[k].ratio)) - level, scale]
        numbers += weights[:-1].tolist()
    return float(np.log(form.points[0].ratio)), np.array(numbers)


def doubled(rounds: int, first: float, numbers: Array) -> Array:
    """The same plan with a second call in every round, half a step earlier and without weight."""
    old, new = serial(rounds), parallel(rounds)
    out, before = np.zeros(new.size), first
    for r in range(1, rounds + 1):
        own = numbers[old.numbers(r)]
        levels, weights = (own[:3], own[3:]) if r < rounds else (own[:0], own)
        # The second call of each round is the plan's own.
        spread = np.zeros(2 * r - 2)
        spread[0 : 2 * r - 2 : 2] = weights
        at = 2 * r - 1 if r < rounds else new.calls
        if r < rounds:
            middle = np.array([0.5 * (before + levels[0]), levels[1], 0.0])
            out[new.numbers(at)] = np.concatenate([middle, np.zeros(2 * r - 2)])
            out[new.numbers(at + 1)] = np.concatenate([levels, spread])
            before = float(levels[0])
        else:
            out[new.numbers(at)] = spread
    return out


def trial(calls: int, kinds: Sequence[str], count: int, rounds: int, say: Callable[[str], None]) -> None:
    train, validation, test = (load(name, size) for name, size in {**SIZES, "train": count}.items())
    first, numbers = start(calls)
    solver = Solver(serial(calls), first)

    def tested(name: str, one: Solver, numbers: Array, nets: Nets | None = None, latest: bool = True) -> None:
        end = one.run(test, np.tile(numbers, (len(test.z), 1)), nets, latest)[0]
        say(f"{calls} rounds, {name}: RMSE {marks(end - test.target)[0]:.4f}, median {marks(end - test.target)[1]:.4f}")

    tested("start", solver, numbers)
    numbers = fit_one(solver, train, numbers, 3 * rounds if calls == 3 else rounds)
    tested("one plan for all", solver, numbers)
    for kind in kinds:
        if kind == "parallel":
            wide = Solver(parallel(calls), first)
            more = fit_one(wide, train, doubled(calls, first, numbers), rounds)
            tested(f"two parallel calls, {wide.order.calls} calls", wide, more)
        else:
            latest = kind == "latest"
            nets, _ = fit_each(solver, train, validation, numbers, rounds, latest, 300)
            tested(f"coefficients for each sample from the {kind} call", solver, numbers, nets, latest)


def latency(repeats: int, say: Callable[[str], None]) -> None:
    """Least time of a sample in 4 calls, in 7 calls in a row and in 7 calls in 4 rounds, in turn on one thread."""
    torch.set_num_threads(1)
    serial = read_plan("docs/tuning/digits-4.json")
    found = ParallelRule.around(serial, 7)
    assert found is not None
    wide = found[0].plan(found[1])
    denoiser = load_model("digits").denoiser(None)
    for batch in (1, 4, 16):
        shape, cond = (batch, 1, 8, 8), {"label": torch.arange(batch) % 10}
        samplers = {
            "4 calls": fs.Sampler(denoiser, serial, shape),
            "7 calls in a row": fs.Sampler(denoiser, wide, shape),
            "7 calls in 4 rounds": fs.Sampler(denoiser, wide, shape, parallel=True),
        }
        times: dict[str, list[float]] = {kind: [] for kind in samplers}
        for _ in range(repeats):
            for kind, sampler in samplers.items():
                begin = time.perf_counter()
                sampler(seed=0, cond=cond)
                times[kind].append(time.perf_counter() - begin)
        text = ", ".join(f"{kind} {1e3 * min(own):.2f} ms" for kind, own in times.items())
        say(f"batch {batch}: {text}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m reports.few_calls", description=__doc__)
    parser.add_argument("--calls", default="3,4", help="comma-separated rounds")
    parser.add_argument("--kinds", default="first,latest,parallel", help="comma-separated trials")
    parser.add_argument("--seeds", type=int, default=SIZES["train"], help="latents to fit to")
    parser.add_argument("--rounds", type=int, default=3, help="of each fit")
    parser.add_argument("--latency", action="store_true", help="time a round against its calls in a row")
    args = parser.parse_args(argv)
    if args.latency:
        latency(100, lambda text: print(text, flush=True))
        return
    for calls in map(int, args.calls.split(",")):
        trial(calls, args.kinds.split(","), args.seeds, args.rounds, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
