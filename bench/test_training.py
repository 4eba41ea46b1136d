"""The time and memory traffic of distillation's arithmetic compared with eager torch, without the networks.

Both sides compute the same result from the same batch, alternately, on one thread; the gate compares both with the
eager expression in float64. Bytes are counted from the tensors that each operator reads and writes, except views.
"""

import statistics

import numpy as np
import pytest

import fewstep as fs
from fewstep.cli.timing import Side, clock, interleaved

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from fewstep.bindings.consistency import ConsistencyDenoiser  # noqa: E402
from fewstep.kernels import launch, layout, torch_ops, torch_train  # noqa: E402
from fewstep.solvers.distill import distribution_matching, latent_consistency, progressive  # noqa: E402
from fewstep.solvers.distill.ema import frozen_copy, update_ema  # noqa: E402
from fewstep.solvers.distill.jumps import Jumps  # noqa: E402

REPEATS = 60
SHAPES = [(256, 2), (8, 4, 64, 64), (16, 16, 128, 128)]  # points, latents in the cache and beyond it
EDM = fs.EDM(0.002, 80.0, 0.5)


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that operators read and write."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(v.numel() * v.element_size() for v in leaves if isinstance(v, torch.Tensor))
        return out


def traffic(run):
    with Traffic() as counted:
        run()
    return counted.bytes


def draws(count, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn((count, *shape), generator=generator, dtype=torch.float64).to(dtype))


def per_sample(grid, which, like):
    """alpha and sigma at each point of the grid from interval `which` on, shaped to broadcast: pick(k) -> both."""
    tables = [torch.tensor(v, dtype=like.dtype) for v in (grid.alpha, grid.sigma)]
    index, shape = torch.as_tensor(which), (-1, *[1] * (like.ndim - 1))
    return lambda k: [table[index + k].reshape(shape) for table in tables]


# --- cases: (shape, dtype) -> (ours, eager), each returning a tuple of tensors ---


def lcm_target(shape, dtype):
    """Guided x0 and eps, then DDIM over 20 times (Luo et al. 2023, eq. 16 to 18)."""
    z, null, conditional = draws(3, shape, dtype)
    raw, process = torch.cat([null, conditional]), fs.VP.scaled_linear()
    grid = latent_consistency.grid(process)
    which = np.arange(shape[0]) % grid.steps
    teacher = fs.Denoiser(lambda x, t: raw, process, guidance=2.0, null={}, dtype=str(dtype)[6:])
    jumps, w = Jumps.over(teacher, grid, "ddim"), np.linspace(5.0, 15.0, shape[0])
    pick, scale = per_sample(grid, which, z), torch.as_tensor(w, dtype=dtype).reshape(-1, *[1] * (z.ndim - 1))
    times = torch.as_tensor(grid.t[which], dtype=torch.float32)

    def eager():
        (a, s), (a2, s2) = pick(0), pick(1)
        eps_u, eps_c = teacher.model(torch.cat([z, z]), torch.cat([times, times])).chunk(2)
        x0_u, x0_c = (z - s * eps_u) / a, (z - s * eps_c) / a
        return (a2 * (x0_c + scale * (x0_c - x0_u)) + s2 * (eps_c + scale * (eps_c - eps_u)),)

    return lambda: (jumps(z, which, {}, 1.0 + w),), eager


def progressive_target(shape, dtype):
    """Two DDIM steps of a v prediction and the x0 that takes one (Salimans & Ho 2022, Algorithm 2)."""
    z, raw = draws(2, shape, dtype)
    grid = fs.grid(fs.VP.linear(), 16, "trailing")
    which = np.arange(shape[0]) % 8
    teacher = fs.Denoiser(lambda x, t: raw, grid.process, "v", dtype=str(dtype)[6:])
    targets, pick = progressive.targets(teacher, grid), per_sample(grid, 2 * which, z)
    times = [torch.as_tensor(grid.t[2 * which + k], dtype=torch.float32) for k in (0, 1)]

    def eager():
        x, points = z, [pick(k) for k in range(3)]
        for (a, s), (a2, s2), t in zip(points, points[1:], times, strict=False):
            v = teacher.model(x, t)
            x0 = a * x - s * v
            x = a2 * x0 + s2 * (x - a * x0) / s
        (a, s), _, (a2, s2) = points
        ratio = s2 / s
        return ((x - ratio * z) / (a2 - ratio * a),)

    return lambda: (targets(z, which),), eager


def heun_target(shape, dtype):
    """One Heun step of a preconditioned teacher (Song et al. 2023, Algorithm 2; Karras et al. 2022, Table 1)."""
    x, raw = draws(2, shape, dtype)
    grid = fs.grid(EDM, 18, "karras", final_zero=False)
    which = np.arange(shape[0]) % grid.steps
    teacher = fs.Denoiser(lambda x, t: raw, EDM, "edm", dtype=str(dtype)[6:])
    jumps, pick = Jumps.over(teacher, grid, "heun"), per_sample(grid, which, x)

    def denoised(x, s):
        root = (s**2 + 0.25).sqrt()
        return 0.25 / root**2 * x + 0.5 * s / root * teacher.model(x / root, s.flatten().log() / 4)

    def eager():
        (_, s), (_, s2) = pick(0), pick(1)
        d = (x - denoised(x, s)) / s
        x2 = x + (s2 - s) * d
        return (x + (s2 - s) * 0.5 * (d + (x2 - denoised(x2, s2)) / s2),)

    return lambda: (jumps(x, which),), eager


def with_gradient(loss_of, x):
    """() -> (the mean loss, its gradient by x)."""

    def run():
        loss = loss_of().mean()
        return (loss.detach(), *torch.autograd.grad(loss, [x]))

    return run


def eager_huber(x, y, c, per_sample):
    if per_sample:
        return ((x - y).square().flatten(1).sum(1) + c * c).sqrt() - c
    return (((x - y) ** 2 + c * c).sqrt() - c).flatten(1).mean(1)


def huber(per_sample):
    def case(shape, dtype):
        x, y = draws(2, shape, dtype)
        x.requires_grad_(True)
        sides = [torch_train.pseudo_huber, eager_huber]
        return tuple(with_gradient(lambda side=side: side(x, y, 0.03, per_sample=per_sample), x) for side in sides)

    return case


def dmd(shape, dtype):
    """The normalised difference of two scores, its loss and the gradient that reaches x (Yin et al. 2024), from the
    two predictions: those cost as much on both sides."""
    x, real, own = draws(3, shape, dtype)
    x.requires_grad_(True)
    floor = distribution_matching.NORM_FLOOR

    def ours():
        return torch_train.score_difference(x, real, own, floor)[0]

    def eager():
        with torch.no_grad():
            norm = (x - real).abs().flatten(1).mean(1).clamp_min(floor)
            goal = x - (own - real) / norm.reshape(-1, *[1] * (x.ndim - 1))
        return 0.5 * (x - goal).square().flatten(1).sum(1)

    return with_gradient(ours, x), with_gradient(eager, x)


def boundary_and_loss(shape, dtype):
    """c_skip x + c_out F against a target under the elementwise pseudo-Huber loss, gradient by F."""
    x, f, y = draws(3, shape, dtype)
    f.requires_grad_(True)
    sigma = np.geomspace(0.01, 50.0, shape[0])
    student = ConsistencyDenoiser(lambda x, t: f, EDM)
    numbers = [student.prologue(EDM.point(float(s))) for s in sigma]
    skip, out = torch.tensor(numbers, dtype=dtype).T
    wide = [v.reshape(-1, *[1] * (x.ndim - 1)) for v in (skip, out)]

    def ours():
        return torch_train.pseudo_huber(torch_train.boundary(x, f, skip, out), y, 0.03, per_sample=False)

    def eager():
        return eager_huber(wide[0] * x + wide[1] * f, y, 0.03, per_sample=False)

    return with_gradient(ours, f), with_gradient(eager, f)


def noising(shape, dtype):
    """x_t = alpha x0 + sigma noise and the network's input c_in x_t, as a stage of one row and one copy."""
    x0, noise = draws(2, shape, dtype)
    table = np.zeros((shape[0], 1, layout.COLUMNS))
    sigma = np.geomspace(0.01, 50.0, shape[0])
    table[:, 0, :2] = np.stack([np.ones_like(sigma), sigma], axis=1)
    w, c_in = (torch.as_tensor(v, dtype=dtype) for v in (table, 1.0 / np.hypot(sigma, 0.5)))
    a, s, c = (v.reshape(-1, *[1] * (x0.ndim - 1)) for v in (w[:, 0, 0], w[:, 0, 1], c_in))

    def eager():
        x = a * x0 + s * noise
        return x, c * x

    def ours():
        return tuple(torch_ops.stage([x0, noise], [0, 1], [], w, c_in, 1, dtype, None, None, None))

    return ours, eager


CASES = {
    "LCM target": lcm_target,
    "progressive target": progressive_target,
    "consistency target by Heun": heun_target,
    "pseudo-Huber, elementwise": huber(False),
    "pseudo-Huber, of the norm": huber(True),
    "DMD2 gradient and loss": dmd,
    "boundary and pseudo-Huber": boundary_and_loss,
    "noising and c_in": noising,
}
# Required ratios of eager's time to ours beyond the cache; the others are reported only.
BUDGETS = {"LCM target": 2, "progressive target": 2, "consistency target by Heun": 2}


def agree(found, expected, tolerance=3e-5):
    """Each output within `tolerance` of the reference's largest element, none missing."""
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        error = float((got.double() - want).abs().max() / want.abs().max())
        assert error <= tolerance, error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_training_arithmetic(name, shape, benchmark, report, one_thread, monkeypatch):
    monkeypatch.setattr(launch, "SERIAL_ELEMENTS", 1 << 62)  # a stage stays on one thread
    exact = CASES[name](shape, torch.float64)[1]()
    ours, eager = CASES[name](shape, torch.float32)
    agree(ours(), exact)
    agree(eager(), exact)
    sides = [Side(side, run).repeated() for side, run in (("fewstep", ours), ("eager", eager))]
    a, b = (1e6 * statistics.median(s) for s in interleaved(sides, REPEATS, clock(1)))
    size = SHAPES.index(shape)
    budget = BUDGETS.get(name) if size == 2 else None
    report(f"{name} {'x'.join(map(str, shape))}", a, b, b / a, budget and (">=", budget))
    if size == 1:
        moved = [traffic(run) / np.prod(shape) for run in (ours, eager)]
        report(f"{name}, bytes an element", *moved, moved[1] / moved[0], unit="B")
    benchmark.pedantic(sides[0].run, rounds=5)


@pytest.mark.parametrize("width", [128, 1024])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_average_of_16_bit_parameters(dtype, width, benchmark, report, one_thread):
    """`update_ema` compared with conversion and `_foreach_lerp_`, on a perceptron of three layers. The kernel takes the
    weights of the wide one: 10 bytes an element (4 + 2 read, 4 written), 20 with the converted copy."""
    net = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(3)))
    kept = [frozen_copy(net) for _ in range(2)]
    net = net.to(getattr(torch, dtype)).requires_grad_(False)
    for p in net.parameters():
        p.add_(0.5)
    pairs = [list(module.parameters()) for module in (kept[1], net)]

    def ours():
        update_ema(kept[0], net, 0.99)

    def eager():
        torch._foreach_lerp_(pairs[0], [p.float() for p in pairs[1]], 0.01)

    want = [k.double() + 0.01 * (p.double() - k.double()) for k, p in zip(*pairs, strict=True)]
    ours()
    eager()
    for found in kept:
        agree(found.parameters(), want, 1e-6)
    sides = [Side(side, run).repeated() for side, run in (("fewstep", ours), ("eager", eager))]
    a, b = (1e6 * statistics.median(s) for s in interleaved(sides, REPEATS, clock(1)))
    budget = (">=", 1.5) if width == 1024 else None
    report(f"float32 average of {dtype} parameters, width {width}", a, b, b / a, budget)
    benchmark.pedantic(sides[0].run, rounds=5)
