"""The named updates against their papers' formulas in float64, and that the compiler sees one node each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.kernels import layout, triton_entries

RAW = layout.RAW


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def table(*rows: dict[int, float]) -> torch.Tensor:
    w = torch.zeros(1, len(rows), layout.COLUMNS, dtype=torch.float64)
    for k, row in enumerate(rows):
        for column, value in row.items():
            w[0, k, column] = value
    return w


# Two noise levels before and the one after, variance preserving; the network predicts epsilon.
ALPHA = [0.3, 0.6, 0.9]
SIGMA = [math.sqrt(1.0 - a * a) for a in ALPHA]
LAMBDA = [math.log(a / s) for a, s in zip(ALPHA, SIGMA, strict=True)]
H_BEFORE, H = LAMBDA[1] - LAMBDA[0], LAMBDA[2] - LAMBDA[1]
PHI = math.expm1(-H)


def test_dpmpp_2m_is_the_papers_update() -> None:
    """Lu et al. 2022b, algorithm 2: D = (1 + 1/2r) m - 1/2r m_before, x' = sigma'/sigma x - alpha' (e^-h - 1) D."""
    x, m_before, eps = (draw(2, 3, 4, seed=i) for i in range(3))
    r = H_BEFORE / H
    m = (x - SIGMA[1] * eps) / ALPHA[1]
    want = SIGMA[2] / SIGMA[1] * x - ALPHA[2] * PHI * ((1 + 0.5 / r) * m - 0.5 / r * m_before)
    of_m = -ALPHA[2] * PHI * (1 + 0.5 / r)
    w = table(
        {0: SIGMA[2] / SIGMA[1] + of_m / ALPHA[1], 1: ALPHA[2] * PHI * 0.5 / r, RAW: -of_m * SIGMA[1] / ALPHA[1]},
        {0: 1.0 / ALPHA[1], RAW: -SIGMA[1] / ALPHA[1]},
    )
    found = triton_entries.dpmpp_multistep(
        x, [m_before], [eps], w, torch.full((1,), 0.5, dtype=torch.float64), copies=2, model_dtype=torch.float64
    )
    torch.testing.assert_close(found.x, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.m, m, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.x_in, torch.cat([0.5 * want] * 2), rtol=1e-13, atol=1e-13)


def test_unipc_corrects_before_it_predicts() -> None:
    """Zhao et al. 2023, order 1 with bh2 (B = e^h - 1 in data prediction, h -> -h): UniC-1 then UniP-1."""
    x, before, m_before, m = (draw(2, 5, seed=i) for i in range(4))
    phi_before = math.expm1(-H_BEFORE)
    corrected = (
        SIGMA[1] / SIGMA[0] * before - ALPHA[1] * phi_before * m_before - 0.5 * ALPHA[1] * phi_before * (m - m_before)
    )
    want = SIGMA[2] / SIGMA[1] * corrected - ALPHA[2] * PHI * m
    correct = {1: SIGMA[1] / SIGMA[0], 2: -0.5 * ALPHA[1] * phi_before, RAW: -0.5 * ALPHA[1] * phi_before}
    ratio = SIGMA[2] / SIGMA[1]
    predict = {j: ratio * c for j, c in correct.items()}
    predict[RAW] -= ALPHA[2] * PHI
    one = torch.ones(1, dtype=torch.float64)
    found = triton_entries.unipc(
        x, before, [m_before], [m], table(predict, correct, {RAW: 1.0}), one, model_dtype=torch.float64
    )
    torch.testing.assert_close(found.x, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.corrected, corrected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.m, m)


def test_edm_churn_rides_on_the_step_before() -> None:
    """Karras et al. 2022, algorithm 2: an Euler step to sigma', then x_hat = x' + sqrt(sigma_hat^2 - sigma'^2) z."""
    x, d, z = (draw(2, 5, seed=i) for i in range(3))
    sigma, after = 3.0, 2.0
    hat = after * 1.2
    euler = x + (after - sigma) * (x - d) / sigma
    want = euler + math.sqrt(hat**2 - after**2) * z
    step = {0: after / sigma, RAW: 1.0 - after / sigma}
    w = table({**step, layout.NOISE: math.sqrt(hat**2 - after**2)}, step)
    one = torch.ones(1, dtype=torch.float64)
    found = triton_entries.edm_churn(x, [], [d], w, one, z, model_dtype=torch.float64)
    torch.testing.assert_close(found.x, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.anchor, euler, rtol=1e-13, atol=1e-13)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    w = torch.zeros(1, 3, layout.COLUMNS)
    with pytest.raises(ValueError, match="w has 3 rows, dpmpp_multistep takes 2"):
        triton_entries.dpmpp_multistep(x, [], [x], w, torch.ones(1))
    with pytest.raises(ValueError, match=r"tensor 1 beside x has shape \(2, 4\), x has \(2, 3\)"):
        triton_entries.dpmpp_multistep(x, [x], [torch.zeros(2, 4)], w[:, :2], torch.ones(1))
    with pytest.raises(ValueError, match="copies = 0"):
        triton_entries.dpmpp_multistep(x, [x], [x], w[:, :2], torch.ones(1), copies=0)


def test_the_compiler_sees_one_node() -> None:
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function" and "fewstep" in str(n.target))
        return graph

    w = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, layout.COLUMNS)).astype(np.float32))
    x, h, raw = (draw(2, 3, seed=i).float() for i in range(3))

    def step(x: torch.Tensor, h: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
        return triton_entries.dpmpp_multistep(x, [h], [raw], w, torch.ones(1)).x

    assert torch.equal(torch.compile(step, backend=spy, fullgraph=True)(x, h, raw), step(x, h, raw))
    assert len(seen) == 1


def test_a_gpu_is_traced_without_one() -> None:
    """Fake CUDA tensors through the named updates: shapes, dtypes and devices of the results."""
    with FakeTensorMode():
        x, raw = torch.empty(2, 3, 4, device="cuda"), torch.empty(2, 3, 4, device="cuda", dtype=torch.bfloat16)
        w, one = torch.empty(1, 2, layout.COLUMNS, device="cuda"), torch.ones(1, device="cuda")
        found = triton_entries.dpmpp_multistep(x, [x], [raw, raw], w, one, copies=2, model_dtype=torch.bfloat16)
    assert [(tuple(t.shape), t.dtype, t.device.type) for t in found] == [
        ((2, 3, 4), torch.float32, "cuda"),
        ((2, 3, 4), torch.float32, "cuda"),
        ((4, 3, 4), torch.bfloat16, "cuda"),
    ]
