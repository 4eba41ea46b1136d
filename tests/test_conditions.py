"""Conditions that nest: batched, spread, kept and compared as deep as they go, or refused by their path."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest

import fewstep as fs
from fewstep.bindings.denoiser import Denoiser
from fewstep.solvers.run.arrays import NumpyFrame
from fewstep.solvers.run.conditions import leaves, mapped, name_of, spread, stacked
from fewstep.solvers.tune.ensemble import Ensemble
from fewstep.solvers.tune.fingerprint import check_plan, fingerprints, keep_conditions, kept_conditions

VP, FRAME = fs.VP.linear(), NumpyFrame()
X = np.random.default_rng(0).standard_normal((3, 5))


class Residuals(NamedTuple):
    down: np.ndarray
    mid: np.ndarray


def cond(seed: int, batch: int = 3) -> dict[str, Any]:
    g = np.random.default_rng(seed)
    return {
        "added": {"pooled": g.standard_normal((batch, 5)), "ids": [g.standard_normal((1, 5)), "text"]},
        "residuals": Residuals(g.standard_normal((batch, 5)), g.standard_normal((batch, 5))),
        "layers": (g.standard_normal((batch, 2, 5)),),
    }


def model(x: Any, t: Any, added: Any, residuals: Residuals, layers: Any) -> Any:
    """Reads every leaf, sample by sample, and insists on the types of the containers."""
    assert isinstance(residuals, Residuals)
    assert isinstance(layers, tuple)
    assert added["ids"][1] == "text"
    shift = added["pooled"] + 2.0 * added["ids"][0] + 3.0 * residuals.down + 5.0 * residuals.mid
    return 0.5 * x / (1.0 + x * x) + 0.01 * (shift + 7.0 * layers[0].sum(1))


def test_leaves_and_their_names() -> None:
    tree = {"b": [1, {"c": None}], "a": (2,)}
    assert [(name_of(path), leaf) for path, leaf in leaves(tree)] == [
        ("cond['a'][0]", 2),
        ("cond['b'][0]", 1),
        ("cond['b'][1]['c']", None),
    ]
    assert mapped(lambda v: (v, "x"), tree) == {"b": [(1, "x"), {"c": (None, "x")}], "a": ((2, "x"),)}


def test_branches_side_by_side() -> None:
    a, b = cond(1), cond(2)
    both = stacked([a, b], FRAME, 3)
    np.testing.assert_array_equal(both["added"]["pooled"], np.concatenate([a["added"]["pooled"], b["added"]["pooled"]]))
    rows = [c["added"]["ids"][0] for c in (a, a, a, b, b, b)]  # one for all samples of a branch
    np.testing.assert_array_equal(both["added"]["ids"][0], np.concatenate(rows))
    np.testing.assert_array_equal(both["residuals"].mid, np.concatenate([a["residuals"].mid, b["residuals"].mid]))
    assert both["added"]["ids"][1] == "text"


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize("guidance", [fs.CFG(2.0), fs.CFG((2.0, 0.5))])
def test_batched_guidance_is_separate_calls(backend: str, guidance: Any) -> None:
    conds = tuple(cond(i) for i in range(3 if len(guidance.scales) == 2 else 2))
    own = {"steps": 4, "cond": conds, "backend": backend}
    together, apart = (fs.sample(Denoiser(model, VP, guidance=guidance, batched=b), X, **own) for b in (True, False))
    np.testing.assert_allclose(together, apart, rtol=1e-10, atol=1e-10)


CALLS = {
    "batched": {"guidance": 2.0},
    "apart": {"guidance": 2.0, "batched": False},
    "for a part of the run": {"guidance": fs.CFG(2.0, start=0.5)},
    "another network": {"guidance": fs.AutoGuidance(lambda x, t, c: each(x, t, c), 2.0)},
}


def each(x: Any, t: Any, c: Any) -> Any:
    """Insists on a condition for each sample."""
    assert len(c) == len(x)
    return 0.5 * x / (1.0 + x * x) + 0.01 * c


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("case", CALLS)
def test_one_condition_for_all_samples_is_one_for_each_under_guidance(case: str, library: str) -> None:
    torch = pytest.importorskip("torch")
    conds = [np.random.default_rng(i).standard_normal((1, 5)) for i in range(2)]
    x, conds = (X, conds) if library == "numpy" else (torch.tensor(X), [torch.tensor(c) for c in conds])
    whole = [{"c": c + 0.0 * x} for c in conds]
    given: Any = [{"c": c} for c in conds]
    if case == "another network":
        whole, given = whole[1], given[1]
    denoiser = Denoiser(each, VP, **CALLS[case])
    got, want = (fs.sample(denoiser, x, steps=3, dtype="float64", cond=own) for own in (given, whole))
    np.testing.assert_array_equal(got, want)


def test_nested_conditions_of_one_are_the_same_in_calls_alone_and_together() -> None:
    """Guidance in a part of the run calls one branch alone elsewhere."""
    lengths = []

    def nested(x: np.ndarray, t: np.ndarray, added: dict[str, np.ndarray]) -> np.ndarray:
        lengths.append((len(x), len(added["c"])))
        return 0.1 * x + added["c"]

    one = {"added": {"c": np.ones((1, 5))}}
    fs.sample(Denoiser(nested, VP, guidance=fs.CFG(2.0, start=0.5)), X, steps=2, cond=(one, one))
    assert lengths == [(3, 3), (6, 6)]


def test_torch_modules_and_dlpack() -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def forward(self, x: Any, t: Any, **own: Any) -> Any:
            return model(x, t, **own)

    conds = [cond(1), cond(2)]
    tensors = mapped(lambda v: torch.from_numpy(v) if isinstance(v, np.ndarray) else v, conds)
    want = fs.sample(Denoiser(model, VP, guidance=2.0), X, steps=3, cond=conds)
    got = fs.sample(Denoiser(Net(), VP, guidance=2.0), torch.from_numpy(X), steps=3, cond=tensors)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c["added"].update(pooled=np.zeros((2, 5))), r"cond\['added'\]\['pooled'\] of branch 1 has shape"),
        (lambda c: c["added"].update(ids=[np.zeros(()), "text"]), r"cond\['added'\]\['ids'\]\[0\] of branch 1"),
        (lambda c: c["added"].update(pooled=np.zeros((3, 6))), r"cond\['added'\]\['pooled'\] has different shapes"),
        (lambda c: c["added"].update(ids=[np.zeros((1, 5)), "other"]), r"cond\['added'\]\['ids'\]\[1\] differs"),
        (lambda c: c["added"].update(more=1), r"different conditions at cond\['added'\]"),
        (lambda c: c.update(layers=[*c["layers"]]), r"different conditions at cond\['layers'\]"),
        (lambda c: c.update(layers=(c["layers"][0], c["layers"][0])), r"different conditions at cond\['layers'\]"),
        (lambda c: c.update(added=None), r"different conditions at cond\['added'\]"),
    ],
)
def test_what_cannot_be_batched_is_named(change: Any, text: str) -> None:
    def never(x: Any, t: Any, **own: Any) -> Any:
        raise AssertionError("the model was called")

    null, one = cond(1), cond(2)
    change(one)
    with pytest.raises(ValueError, match=text + r".*batched=False"):
        fs.sample(Denoiser(never, VP, guidance=2.0), X, steps=2, cond=(null, one))


def test_unbatched_branches_take_anything() -> None:
    """A list with a prompt of its own length for each sample."""

    def listed(x: np.ndarray, t: np.ndarray, prompts: list[np.ndarray]) -> np.ndarray:
        return 0.1 * x + np.array([p.mean() for p in prompts])[:, None]

    prompts = [{"prompts": [np.full((n, 2), float(n + i)) for n in (3, 4, 6)]} for i in range(2)]
    got = fs.sample(Denoiser(listed, VP, guidance=2.0, batched=False), X, steps=2, cond=prompts)
    means = [{"prompts": [np.full(1, float(n + i)) for n in (3, 4, 6)]} for i in range(2)]
    want = fs.sample(Denoiser(listed, VP, guidance=2.0, batched=False), X, steps=2, cond=means)
    np.testing.assert_allclose(got, want)


def test_samples_of_an_adaptive_run_keep_their_own() -> None:
    """Samples leave the batch as they finish; each ends as it does alone."""
    denoiser, conds = Denoiser(model, VP, guidance=2.0), (cond(1), cond(2))
    x = X * np.array([[1.0], [10.0], [100.0]])
    together = fs.sample_adaptive(denoiser, x, rtol=1e-3, atol=1e-3, cond=conds, check=False)
    assert len({int(n) for n in together.nfe}) > 1
    for i in range(3):
        own = mapped(lambda v, i=i: v[i : i + 1] if isinstance(v, np.ndarray) and len(v) > 1 else v, list(conds))
        alone = fs.sample_adaptive(denoiser, x[i : i + 1], rtol=1e-3, atol=1e-3, cond=own, check=False)
        np.testing.assert_allclose(together.x[i], alone.x[0], rtol=1e-9, atol=1e-9)
    conds[1]["added"]["pooled"] = np.zeros((2, 5))
    with pytest.raises(ValueError, match=r"cond\['added'\]\['pooled'\]"):
        fs.sample_adaptive(Denoiser(model, VP, guidance=2.0, batched=False), x, cond=conds, check=False)


def test_conditions_go_round_the_samples() -> None:
    given = {"added": {"label": np.arange(3), "size": np.ones((1, 2))}, "pair": (np.arange(2), "text")}
    (found,) = spread([given], FRAME, [0, 4, 5])
    np.testing.assert_array_equal(found["added"]["label"], [0, 1, 2])
    np.testing.assert_array_equal(found["pair"][0], [0, 0, 1])
    assert found["added"]["size"].shape == (1, 2)
    with pytest.raises(ValueError, match=r"cond\['prompts'\]\[1\] of branch 0 has shape \(5, 2\)"):
        spread([{"prompts": [np.zeros((3, 2)), np.zeros((5, 2))]}], FRAME, [0, 1])


def test_tuning_takes_them_and_keeps_them() -> None:
    denoiser, conds = Denoiser(model, VP, guidance=2.0), (cond(1, 4), cond(2, 4))
    z = np.random.default_rng(3).standard_normal((4, 5))
    plan = fs.plan("ddim", fs.grid(VP, 8))
    ends = Ensemble(denoiser, z, conds).reference(plan)
    x = plan.start.sigma * z
    want = fs.Sampler(denoiser, plan, (4, 5), dtype="float64", backend="naive")(x, cond=conds)
    np.testing.assert_allclose(ends, want, rtol=1e-9)
    kept = keep_conditions(denoiser, FRAME, conds)
    assert kept is None  # a named tuple is no type of JSON's
    plain = tuple({**c, "residuals": tuple(c["residuals"])} for c in conds)

    def unnamed(x: Any, t: Any, residuals: Any, **own: Any) -> Any:
        return model(x, t, residuals=Residuals(*residuals), **own)

    other = Denoiser(unnamed, VP, guidance=2.0)
    kept = keep_conditions(other, FRAME, plain)
    assert kept is not None
    assert fingerprints(other, (5,), kept_conditions(kept, FRAME)) == fingerprints(other, (5,), plain)
    plain[1]["added"]["pooled"] = plain[1]["added"]["pooled"] + 1.0
    assert fingerprints(other, (5,), kept_conditions(kept, FRAME)) != fingerprints(other, (5,), plain)
    check_plan(plan, other)


def test_recommend_measures_with_them() -> None:
    found = fs.recommend(4, denoiser=Denoiser(model, VP, guidance=2.0), shape=(5,), cond=(cond(1), cond(2)), cache=None)
    assert found.plan.nfe <= 4


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("backend", ["numba", "naive"])
def test_conditions_may_have_the_names_of_our_arguments(backend: str, library: str) -> None:
    torch = pytest.importorskip("torch")  # with it imported, NumPy models are wrapped

    def model(sample: Any, level: Any, /, *, x_in: Any, t: Any) -> Any:
        return 0.1 * sample + 0.1 * x_in + 0.01 * t

    x: Any = np.linspace(-1.0, 1.0, 6, dtype=np.float32).reshape(2, 3)
    cond: dict[str, Any] = {"x_in": np.full((2, 1), 0.5, np.float32), "t": 3.0}
    if library == "torch":
        x, cond["x_in"] = torch.from_numpy(x), torch.from_numpy(cond["x_in"])
    plan = fs.plan("euler", fs.grid(fs.VP.linear(), 3))
    found, want = (
        fs.Sampler(fs.Denoiser(each, fs.VP.linear()), plan, (2, 3), backend=backend, device=device)
        for each, device in ((model, "cpu" if library == "torch" else None), (lambda x, t, **_: 0.1 * x + 0.08, None))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # x is no unit normal
        np.testing.assert_allclose(np.asarray(found(x, cond=cond)), want(np.asarray(x)), rtol=1e-5)
