"""`triton_step.stage` against `naive.step`: structures, dtypes, odd sizes, NaN wherever nothing may read.

The state's numbers must agree to the bit: same terms, same order, one rounding each. float32 and float16 model
inputs too; Triton's interpreter rounds to bfloat16 by truncation (the compiled kernel does not, see
`test_triton_compile.py`), so bfloat16 inputs are compared with the truncated x.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_kernels import GUARD, STRUCTURES, TORCH, Structure, make

from fewstep.kernels import layout, naive, triton_step

MINE = [s for s in STRUCTURES if s.state == "f32" and s.raw != "f64"]
MORE = [
    Structure("xxx", 2, 2, 2, "limit", "z", raw="bf16", model="bf16"),
    Structure("xx", 3, 2, 3, "p", raw="f16", model="f16"),
    Structure("x----x", 2, 5, 1, "", "z"),
]


def tensor(a: np.ndarray | None) -> torch.Tensor | None:
    return None if a is None else torch.from_numpy(a)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_step, "block", lambda: (64, 4))


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per sample"])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (2, 145)], ids=str)
@pytest.mark.parametrize("structure", MINE + MORE, ids=lambda s: "-".join(str(f) for f in s if f != ""))
def test_a_stage(structure: Structure, batch: int, n: int, own: bool) -> None:
    names = ("w", "p", "limit", "c_in")
    case = make(structure, 7 * n + own, batch, n, dict.fromkeys(names, own), 0.7)
    kernel, z = case.kernel, case.z  # drawn noise is `run_kernel`'s; here it comes as a tensor
    memory = [torch.full((batch * n + 2 * GUARD,), float("nan"), dtype=TORCH[k])
              for k in [structure.state] * structure.outputs + [structure.model] * structure.inputs]  # fmt: skip
    new = [m[GUARD : GUARD + batch * n].reshape(batch, n) for m in memory]
    outputs, inputs = new[: structure.outputs], new[structure.outputs :]
    tables = {name: tensor(kernel[name]) for name in ("w", "p", "limit", "c_in")}
    w = tables.pop("w")
    triton_step.stage(case.slots, case.raws, w, outputs, inputs, z=z, **tables)

    limit = None if kernel["limit"] is None else kernel["limit"][:, :2]
    twin = naive.step(case.slots, case.raws, kernel["w"], z=z, p=kernel["p"], limit=limit)
    for out, want in zip(outputs, twin, strict=True):
        np.testing.assert_array_equal(out.numpy(), want.numpy())
    scaled = twin[0] * torch.from_numpy(kernel["c_in"])[:, None]
    if structure.model == "bf16":
        scaled = (scaled.view(torch.int32) & -65536).view(torch.float32)
    for copy in inputs:
        np.testing.assert_array_equal(copy.float().numpy(), scaled.to(TORCH[structure.model]).float().numpy())
    for m in memory:
        assert m[:GUARD].isnan().all()
        assert m[-GUARD:].isnan().all()


def test_an_output_may_overwrite_an_input() -> None:
    """Every element's loads precede its stores: slots, and a network that returned its own input."""
    g = torch.Generator().manual_seed(0)
    x, h, raw = (torch.randn(2, 150, generator=g) for _ in range(3))
    w = torch.randn(1, 2, layout.COLUMNS, generator=g)
    w[:, :, 2 : layout.RAW] = w[:, :, layout.RAW + 1 :] = 0.0
    want = naive.step([x, h], [raw], w.numpy())
    wanted_input = want[0] * 0.5
    triton_step.stage([x, h], [raw], w, [h, x], [raw], c_in=torch.full((1,), 0.5))
    assert torch.equal(h, want[0])
    assert torch.equal(x, want[1])
    assert torch.equal(raw, wanted_input)


def test_a_nan_that_is_read_reaches_the_output() -> None:
    raw = torch.tensor([[1.0, float("nan"), 3.0]])
    w = torch.zeros(1, 1, layout.COLUMNS)
    w[0, 0, layout.PREDICTION] = 2.0
    out = torch.zeros(1, 3)
    triton_step.stage(
        [None], [raw], w, [out], c_in=torch.ones(1), p=torch.tensor([[0.0, 1.0, 0.0, 0.0]]),
        limit=torch.tensor([[2.0, 0.5, 0.0, 0.0]]),
    )  # fmt: skip
    np.testing.assert_array_equal(out.numpy(), [[1.0, np.nan, 2.0]])
