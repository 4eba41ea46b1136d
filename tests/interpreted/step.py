"""`triton_step.stage` against `naive.step`: structures, dtypes, odd sizes, NaN in memory that must not be read.

The state's numbers must agree to the bit: same terms, same order, one rounding each. float32 and float16 model
inputs too; Triton's interpreter rounds to bfloat16 by truncation (the compiled kernel does not, see
`test_triton_compile.py`), so bfloat16 inputs are compared with the truncated x.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_kernels import GUARD, STRUCTURES, TORCH, Structure, make

from fewstep.kernels import layout, naive, triton_noise, triton_step

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
    sizes = [(structure.state, batch * n)] * structure.outputs + [(structure.model, structure.inputs * batch * n)]
    memory = [torch.full((size + 2 * GUARD,), float("nan"), dtype=TORCH[kind]) for kind, size in sizes]
    *outputs, x_in = [m[GUARD:-GUARD].reshape(-1, n) for m in memory]
    tables = {name: tensor(kernel[name]) for name in ("w", "p", "limit", "c_in")}
    w = tables.pop("w")
    triton_step.stage(case.slots, case.raws, w, outputs, x_in if structure.inputs else None, z=z, **tables)

    limit = None if kernel["limit"] is None else kernel["limit"][:, :2]
    twin = naive.step(case.slots, case.raws, kernel["w"], z=z, p=kernel["p"], limit=limit)
    for out, want in zip(outputs, twin, strict=True):
        np.testing.assert_array_equal(out.numpy(), want.numpy())
    scaled = twin[0] * torch.from_numpy(kernel["c_in"])[:, None]
    if structure.model == "bf16" and triton_noise.INTERPRETED:
        scaled = (scaled.view(torch.int32) & -65536).view(torch.float32)
    for copy in x_in.split(batch) if structure.inputs else ():
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
    triton_step.stage([x, h], [raw], w, [h, x], raw, c_in=torch.full((1,), 0.5))
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


def test_a_table_may_be_a_part_of_a_wider_one() -> None:
    """Only the sample axis has another stride, as in a reduction's row: (p, limit) of each sample adjacent."""
    g = torch.Generator().manual_seed(0)
    x, raw = torch.randn(3, 20, generator=g), torch.randn(3, 20, generator=g)
    wide = {"w": torch.randn(3, 4, layout.COLUMNS, generator=g), "c_in": torch.randn(3, 5, generator=g)}
    reduced = torch.randn(3, 8, generator=g).abs()
    tables = {"w": wide["w"][:, :2], "c_in": wide["c_in"][:, 0], "p": reduced[:, :4], "limit": reduced[:, 4:]}
    found = []
    for kept in (tables, {name: table.contiguous() for name, table in tables.items()}):
        outputs, x_in = [torch.zeros(3, 20) for _ in range(2)], torch.zeros(6, 20)
        rest = {name: table for name, table in kept.items() if name != "w"}
        triton_step.stage([x], [raw], kept["w"], outputs, x_in, **rest)
        found.append(torch.cat([*outputs, x_in]))
    assert torch.equal(*found)
    want = naive.step([x], [raw], tables["w"].numpy(), p=reduced[:, :4].numpy(), limit=reduced[:, 4:6].numpy())
    assert torch.equal(found[0][:3], want[0])
