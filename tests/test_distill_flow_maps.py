"""Students of two times: the plan tells a network the end of its step, and the objectives vanish at the exact map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_distill_teachers import normals

import fewstep as fs
from fewstep.bindings.export.sampler_module import SamplerModule
from fewstep.bindings.flow_map import FlowMapDenoiser
from fewstep.solvers.distill import flow_maps, mean_flow, shortcut
from fewstep.solvers.distill.network import points_of
from fewstep.solvers.distill.two_times import average_velocity, jump, logit_normal_times, with_end
from fewstep.solvers.plans.ends import step_ends
from reports import mean_flow_weight

# torch's own set-up, at the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

FLOW, EDM, VP = fs.Flow(), fs.EDM(0.002, 80.0), fs.VP.linear()
MU, S = 0.4, 0.3
TIMES, ENDS = [1.0, 0.9, 0.5, 0.3, 0.7], [0.0, 0.2, 0.5, 0.05, 0.6]


def flow_to(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The flow of N(MU, S^2) from t to s: it keeps the standardised x."""
    return (1 - s) * MU + torch.hypot((1 - s) * S, s) / torch.hypot((1 - t) * S, t) * (x - (1 - t) * MU)


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The derivative of `flow_to` by s, at s = t: -MU + (t - (1 - t) S^2) / ((1 - t)^2 S^2 + t^2) (x - (1 - t) MU)."""
    return -MU + (t - (1 - t) * S**2) / ((1 - t) ** 2 * S**2 + t**2) * (x - (1 - t) * MU)


def exact(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The average velocity (x_t - x_s) / (t - s), and the velocity for s = t."""
    t, s = t[:, None], s[:, None]
    same = t == s
    span = torch.where(same, torch.ones_like(t), t - s)
    return torch.where(same, velocity(x, t), (x - flow_to(x, t, s)) / span)


def wrong(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x + 0.5 * torch.sin(2.0 * t)[:, None] - 0.3 * (s**2)[:, None])


def student(net: Any, process: Any = FLOW, predicts: str = "flow", **options: Any) -> FlowMapDenoiser:
    return FlowMapDenoiser(net, process, predicts, time_dtype="float64", **options)


@pytest.mark.parametrize(
    ("process", "predicts", "scale", "kind"),
    [
        (FLOW, "flow", 1e3, "float32"),
        (EDM, "edm", 1.0, "float32"),
        (VP, "v", 1.0, "float32"),
        (FLOW, "flow", 1e3, "int64"),  # `Denoiser.time` then takes one point only
        (VP, "v", 1.0, "int64"),
    ],
)
def test_the_ends_of_a_batch_are_those_of_each_point_alone(
    process: Any, predicts: str, scale: float, kind: str
) -> None:
    calls = []

    class Own(FlowMapDenoiser):
        def end_time(self, to: fs.Point) -> float:
            calls.append(np.ndim(to.t))
            return super().end_time(to)

    net = Own(wrong, process, predicts, time_dtype=kind, time_scale=scale)
    times = {FLOW: 1.0, EDM: 80.0, VP: 999.0}[process] * np.random.default_rng(0).uniform(size=512)
    if kind == "int64":
        times = np.round(times * scale) / scale
    to = points_of(process, times)
    if process is not VP:  # clean data, where EDM's times end before
        to = fs.Point(*(np.append(own[:-1], end) for own, end in zip(to, process.clean, strict=True)))
    found = with_end(net, None, to, torch.zeros(512, 2))["s"]
    assert calls == [0, 0, 1, *[0] * (512 if kind == "int64" else 0)]
    want = [FlowMapDenoiser.end_time(net, fs.Point(*map(float, point))) for point in zip(*to, strict=True)]
    assert torch.equal(found, torch.tensor(want, dtype=getattr(torch, kind)))
    assert np.isfinite(want).all()


def teacher() -> fs.Denoiser:
    return fs.Denoiser(lambda x, t: velocity(x, t[:, None]), FLOW, "flow", time_dtype="float64")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return MU + S * normals(5, 2, seed=1), normals(5, 2, seed=2)


# --- the plan tells the network where its steps end ---


@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_the_exact_map_samples_the_flow_in_any_number_of_steps(solver: str) -> None:
    eps = normals(6, 2)
    want = MU + S * eps
    for steps in (1, 2, 5):
        got = fs.sample(student(exact), eps, solver=solver, steps=steps)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # t is rounded to float32 before it is looked up


def test_tcd_goes_below_the_next_point_and_lcm_to_data() -> None:
    """Each step's end is told, also where noise follows: against the loop written out, with the times it saw."""
    grid = fs.Grid.from_times(FLOW, [1.0, 0.6, 0.0])
    z = {k: normals(3, 2, seed=k) for k in range(4)}
    for solver, options, ends in (("tcd", {"gamma": 0.5}, [0.3, 0.0]), ("lcm", {}, [0.0, 0.0])):
        seen: list[tuple[float, float]] = []

        def net(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, seen: Any = seen) -> torch.Tensor:
            seen.append((float(t[0]), float(s[0])))
            return exact(x, t, s)

        got = fs.sample(
            student(net), z[0], solver=solver, grid=grid, check=False,
            noise=lambda draw, at, to, shape: z[draw], **options,
        )  # fmt: skip
        times = [1.0, 0.6]
        assert seen[-2:] == [pytest.approx(pair, abs=1e-6) for pair in zip(times, ends, strict=True)]
        x = z[0]
        for k, (t, s, to) in enumerate(zip(times, ends, [0.6, 0.0], strict=True)):
            x = flow_to(x, torch.tensor(t), torch.tensor(s))
            scale = (1 - to) / (1 - s)
            x = scale * x + np.sqrt(max(0.0, to**2 - (scale * s) ** 2)) * z[k + 1]
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-6)


def test_the_log_probability_of_a_rollout() -> None:
    """The network is told the ends of the plan's steps again: against each jump written out."""
    grid, gamma = fs.Grid.from_times(FLOW, [1.0, 0.6, 0.2, 0.0]), 0.5
    plan, denoiser = fs.plan("tcd", grid, gamma=gamma, dtype="float64"), student(exact)
    path = fs.rollout(denoiser, plan, (3, 2), seed=0, device="cpu", dtype="float64")
    found = fs.log_prob(denoiser, plan, path.states).log_prob
    for k, (t, to) in enumerate(((1.0, 0.6), (0.6, 0.2))):
        s = (1.0 - gamma) * to
        mean = (1 - to) / (1 - s) * flow_to(path.states[k], *torch.tensor([t, s], dtype=torch.float64))
        std = np.sqrt(to**2 - ((1 - to) / (1 - s) * s) ** 2)
        want = torch.distributions.Normal(mean, std).log_prob(path.states[k + 1]).sum(1)
        torch.testing.assert_close(found[:, k], want, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(path.log_prob[:, k], want, rtol=1e-9, atol=1e-9)


def test_solvers_with_a_history_and_calls_without_an_end_are_refused() -> None:
    grid = fs.grid(FLOW, 4)
    for solver in ("dpmpp_2m", "heun", "unipc"):
        with pytest.raises(ValueError, match=f"solver '{solver}' takes its steps by more than one prediction"):
            fs.Sampler(student(wrong), fs.plan(solver, grid), (3, 2), device="cpu", dtype="float64")
    with pytest.raises(ValueError, match="without the end of its step"):
        student(wrong).bind(fs.Sampler(student(wrong), fs.plan("euler", grid), (3, 2), device="cpu").frame, 3, None)(
            (0,), normals(3, 2), torch.ones(3)
        )
    with pytest.raises(ValueError, match="end = 'a b'"):
        FlowMapDenoiser(wrong, FLOW, end="a b")
    # In bfloat16 the times 0.998 and 1 are one: the network would be told the end of the other step.
    for kind, fits in (("bfloat16", 64), ("float16", 512), ("float32", 512)):
        narrow = FlowMapDenoiser(wrong, FLOW, time_dtype=kind)
        ends = narrow.for_plan(fs.plan("euler", fs.grid(FLOW, fits))).model.table
        assert ends.shape == (2, fits)
        assert ends[0, :-1].tolist() == pytest.approx(ends[1, 1:].tolist(), abs=2e-3)
    with pytest.raises(ValueError, match=r"at t = 1 \(bfloat16\) for steps that end at 0.998333 and 0.996667"):
        FlowMapDenoiser(wrong, FLOW, time_dtype="bfloat16").for_plan(fs.plan("euler", fs.grid(FLOW, 600)))
    assert [to.t for to in step_ends(fs.plan("euler", grid))] == grid.t[1:].tolist()


def test_guidance_conditions_numpy_and_mixed_precision_reach_the_network_with_its_end() -> None:
    seen: list[tuple[Any, Any]] = []

    def net(x: Any, t: Any, c: Any, end: Any) -> Any:
        seen.append((t, end))
        a = c["a"][:, None]
        return 0.1 * x + (a.astype(x.dtype) if isinstance(x, np.ndarray) else a.to(x))

    denoiser = FlowMapDenoiser(net, FLOW, guidance=2.0, end="end")
    for array in (np.asarray, torch.tensor):
        cond = tuple({"c": {"a": array([v] * 3, dtype=None)}} for v in (0.0, 1.0))
        x = normals(3, 2).numpy() if array is np.asarray else normals(3, 2)
        got = fs.sample(denoiser, x, solver="euler", grid=fs.Grid.from_times(FLOW, [1.0, 0.5, 0.0]), cond=cond)
        want = np.asarray(x)
        for _ in range(2):
            want = want - 0.5 * (0.1 * want + 2.0)  # the null branch is 0.1 x, the other 0.1 x + 1
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6, atol=1e-6)
        t, end = seen[-1]
        assert len(t) == len(end) == 6
        assert t.dtype == end.dtype
        assert end.tolist() == [0.0] * 6
    wide = FlowMapDenoiser(lambda x, t, s: x * s.to(x)[:, None, None, None, None], FLOW, dtype="bfloat16")
    x = normals(2, 3, 2, 4, 4).float()  # latents of a video
    got = fs.sample(wide, x, solver="euler", grid=fs.Grid.from_times(FLOW, [1.0, 0.5, 0.0]))
    torch.testing.assert_close(got, (x - 0.25 * x), rtol=2e-2, atol=2e-2)


def test_an_exported_loop_and_a_new_plan_have_their_own_ends() -> None:
    net = torch.nn.Linear(1, 1).double()  # a parameter to hold

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = net

        def forward(self, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return exact(x, t, s) + 0.0 * self.one.weight[0, 0]

    denoiser, eps = student(Net()), normals(3, 2)
    plans = [fs.plan("euler", fs.grid(FLOW, n)) for n in (2, 3)]
    sampler = fs.Sampler(denoiser, plans[0], (3, 2), device="cpu", dtype="float64")
    for plan in (plans[0], plans[1], plans[0]):
        sampler.update(plan)
        torch.testing.assert_close(sampler(eps), MU + S * eps, rtol=0, atol=1e-6)
    module = SamplerModule(denoiser, plans[1], dtype="float64")
    torch.testing.assert_close(module(eps), MU + S * eps, rtol=0, atol=1e-6)


# --- objectives ---


@pytest.mark.parametrize("derivative", ["forward", "differences"])
def test_mean_flow_vanishes_at_the_average_velocity_of_a_gaussian(derivative: str) -> None:
    x0, eps = batch()
    other = fs.problems.Gaussian(MU, S).denoiser(FLOW)  # a teacher of another prediction type
    for own in (teacher(), other):
        loss = mean_flow.loss(student(exact), x0, eps, TIMES, ENDS, teacher=own, derivative=derivative)
        assert loss.item() < (1e-18 if derivative == "forward" else 1e-12), loss
    assert mean_flow.loss(student(wrong), x0, eps, TIMES, ENDS, teacher=teacher()).item() > 0.1


@pytest.mark.parametrize("improved", [False, True])
def test_mean_flow_is_its_formula_with_the_datas_velocity(improved: bool) -> None:
    """The derivative along (v, 1, 0) by differences, and the gradient of the weighted square."""
    x0, eps = batch()
    gain = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def net(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return wrong(gain * x, t, s)

    t, s = (torch.tensor(v, dtype=torch.float64) for v in (TIMES, ENDS))
    x, h = (1 - t)[:, None] * x0 + t[:, None] * eps, 1e-6
    v = eps - x0
    towards = net(x, t, t).detach() if improved else v
    with torch.no_grad():
        moved = (net(x + h * towards, t + h, s) - net(x - h * towards, t - h, s)) / (2 * h)
    square = (net(x, t, s) - (v - (t - s)[:, None] * moved)).square().sum(1)
    want = (square / (square.detach() + 0.01) ** 0.5).mean()
    got = mean_flow.loss(student(net), x0, eps, TIMES, ENDS, improved=improved, power=0.5, floor=0.01)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(v, gain)[0] for v in (got, want)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("elements", "power"), [(2, 0.0), (31, 0.0), (32, 1.0)])
def test_mean_flows_weight_is_for_samples_of_many_elements(elements: int, power: float) -> None:
    """In few, its minimum is not the mean velocity, and more calls are worse."""
    x0, eps = torch.randn((2, len(TIMES), elements), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser = student(lambda x, t, s: 0.1 * x * (t + s)[:, None])
    own, given = (mean_flow.loss(denoiser, x0, eps, TIMES, ENDS, **more) for more in ({}, {"power": power}))
    assert own == given


def test_the_reports_minimum_of_the_weighted_loss_is_stationary_and_lower_than_the_mean() -> None:
    v = np.random.default_rng(0).normal(size=(40, 2)) + np.repeat([[0.0, 0.0], [6.0, 1.0]], [30, 10], axis=0)

    def loss(u: np.ndarray) -> float:
        return float(np.log(((u - v) ** 2).sum(axis=1) + mean_flow_weight.FLOOR).mean())

    u = mean_flow_weight.weighted_minimum(v)
    assert loss(u) < loss(v.mean(axis=0)) - 0.1
    pull = (u - v) / (((u - v) ** 2).sum(axis=1, keepdims=True) + mean_flow_weight.FLOOR)
    assert np.abs(pull.mean(axis=0)).max() < 1e-3 * np.abs(pull).mean()


def test_improved_mean_flow_regresses_the_velocity_at_the_exact_map() -> None:
    """There u + (t - s) du/dt = v(x_t): what is left is the variance of eps - x0, as in flow matching."""
    x0, eps = batch()
    t = torch.tensor(TIMES, dtype=torch.float64)[:, None]
    x = (1 - t) * x0 + t * eps
    want = (velocity(x, t) - (eps - x0)).square().sum(1).mean()
    got = mean_flow.loss(student(exact), x0, eps, TIMES, ENDS, improved=True, power=0.0)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    plain = mean_flow.loss(student(exact), x0, eps, TIMES, ENDS, power=0.0)
    assert abs(plain.item() / want.item() - 1.0) > 0.01
    with pytest.raises(ValueError, match="improved=True with a teacher"):
        mean_flow.loss(student(exact), x0, eps, TIMES, ENDS, improved=True, teacher=teacher())


@pytest.mark.parametrize("kind", ["eulerian", "lagrangian"])
def test_both_derivatives_of_the_exact_map_vanish_and_others_are_differences(kind: str) -> None:
    x0, eps = batch()
    at, to = points_of(FLOW, TIMES), points_of(FLOW, np.maximum(ENDS, 0.01))
    t, s = (torch.tensor(v)[:, None] for v in (at.sigma, to.sigma))
    x = (1 - t) * x0 + t * eps
    g = flow_maps.tangent(student(exact), teacher(), x, at, to, kind=kind)
    torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-12)
    assert flow_maps.loss(student(exact), teacher(), x0, eps, at.sigma, to.sigma, kind=kind).item() < 1e-22
    # df/dt along the exact flow, and v(f, s) - df/ds, of a network that is no map.
    h = 1e-6

    def f(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return x - (t - s) * wrong(x, t[:, 0], s[:, 0])

    got = flow_maps.tangent(student(wrong), teacher(), x, at, to, kind=kind)
    if kind == "eulerian":
        want = (f(flow_to(x, t, t + h), t + h, s) - f(flow_to(x, t, t - h), t - h, s)) / (2 * h)
    else:
        want = velocity(f(x, t, s), s) - (f(x, t, s + h) - f(x, t, s - h)) / (2 * h)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    # The loss has the gradient of moving u along g / (|g| + c).
    gain = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    net = student(lambda x, t, s: gain * wrong(x, t, s))
    loss = flow_maps.loss(net, teacher(), x0, eps, at.sigma, to.sigma, kind=kind, floor=0.2)
    step = want / (want.norm(dim=1, keepdim=True) + 0.2)
    slope = -(2 * step * wrong(x, t[:, 0], s[:, 0])).mean(1).mean()
    torch.testing.assert_close(torch.autograd.grad(loss, gain)[0], slope, rtol=1e-5, atol=0)
    cold = flow_maps.tangent(student(wrong), teacher(), x, at, at, kind=kind)
    torch.testing.assert_close(cold, velocity(x, t) - wrong(x, t[:, 0], t[:, 0]), rtol=1e-12, atol=1e-12)


def test_the_exact_map_is_two_of_its_half_steps() -> None:
    x0, eps = batch()
    net = student(exact)
    assert shortcut.consistency_loss(net, net, x0, eps, TIMES, ENDS).item() < 1e-28
    t, s = (torch.tensor(v, dtype=torch.float64)[:, None] for v in (TIMES, ENDS))
    x, m = (1 - t) * x0 + t * eps, 0.5 * (t + s)
    first = wrong(x, t[:, 0], m[:, 0])
    second = wrong(x - (t - m) * first, m[:, 0], s[:, 0])
    want = (wrong(x, t[:, 0], s[:, 0]) - 0.5 * (first + second)).square().mean()
    got = shortcut.consistency_loss(student(wrong), student(wrong), x0, eps, TIMES, ENDS)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert shortcut.matching_loss(net, x0, eps, TIMES, teacher=teacher()).item() < 1e-28
    want = (wrong(x, t[:, 0], t[:, 0]) - (eps - x0)).square().mean()
    torch.testing.assert_close(shortcut.matching_loss(student(wrong), x0, eps, TIMES), want, rtol=1e-12, atol=0)


def test_the_weight_of_the_velocity_falls() -> None:
    weights = [shortcut.matching_weight(k, 100, 0.1) for k in (0, 40, 50, 70, 100)]
    np.testing.assert_allclose(weights, [1.0, 1.0, 0.85, 0.55, 0.1], rtol=1e-12)
    assert [shortcut.matching_weight(k, 10, 0.0, 0.0) for k in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert [shortcut.matching_weight(k, 10, 1.0) for k in (0, 9, 10)] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="step = 9 of 8"):
        shortcut.matching_weight(9, 8)
    for odd in ({"begin": 1.0}, {"end": 2.0}, {"end": float("nan")}):
        with pytest.raises(ValueError, match="begin must be from 0 to below 1"):
            shortcut.matching_weight(1, 8, **odd)


def test_the_drawn_times_are_steps_of_the_flow() -> None:
    times, ends = shortcut.draw_steps(4000, torch.Generator().manual_seed(0), finest=8)
    lengths = times - ends
    assert sorted(set(lengths)) == [0.25, 0.5, 1.0]
    assert all(abs((lengths == d).mean() - 1 / 3) < 0.03 for d in (0.25, 0.5, 1.0))
    assert np.all(times / lengths == np.round(times / lengths))
    assert {(t, s) for t, s in zip(times, ends, strict=True) if t - s == 0.5} == {(1.0, 0.5), (0.5, 0.0)}
    with pytest.raises(ValueError, match="finest = 6"):
        shortcut.draw_steps(4, torch.Generator(), finest=6)
    times, ends = logit_normal_times(4000, torch.Generator().manual_seed(0), same=0.25)
    assert np.all(ends <= times)
    assert (ends == times).sum() == 1000
    middle = np.median(np.concatenate([times[1000:], ends[1000:]]))
    assert np.log(middle / (1 - middle)) == pytest.approx(-0.4, abs=0.05)


def test_a_jump_is_the_samplers_own_step_in_every_process() -> None:
    for process, predicts in ((FLOW, "flow"), (EDM, "edm"), (VP, "v")):
        grid = fs.grid(process, 2)
        net = student(lambda x, t, s: torch.tanh(x + 0.01 * t[:, None] - 0.02 * s[:, None]), process, predicts)
        x = grid.sigma[0] * normals(3, 2)
        want = fs.Sampler(net, fs.plan("ddim", grid), (3, 2), device="cpu", dtype="float64")(x)
        for k in range(2):
            ends = [fs.Point(*(np.full(3, v[i]) for v in (grid.t, grid.alpha, grid.sigma))) for i in (k, k + 1)]
            x = jump(net, x, *ends)
        torch.testing.assert_close(x, want, rtol=1e-9, atol=1e-9)
    clean = points_of(FLOW, [0.0] * 3)
    x = normals(3, 2)
    torch.testing.assert_close(jump(student(wrong), x, clean, clean), x, rtol=0, atol=0)


def test_bad_students_times_and_ends_are_named() -> None:
    x0, eps = batch()
    with pytest.raises(TypeError, match="the student is a Denoiser: a network of two times"):
        average_velocity(teacher(), x0, points_of(FLOW, TIMES), points_of(FLOW, ENDS))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 <= end <= time"):
        mean_flow.loss(student(wrong), x0, eps, ENDS, TIMES)
    with pytest.raises(ValueError, match="predicts='v': this objective takes a network of velocities"):
        mean_flow.loss(student(wrong, VP, "v"), x0, eps, TIMES, ENDS)
    with pytest.raises(ValueError, match="end holds 2 points for a batch of 5"):
        average_velocity(student(wrong), x0, points_of(FLOW, TIMES), points_of(FLOW, ENDS[:2]))
