"""Edits on backend "triton": eager against the oracle, and under graphs with the fake of CUDA's capture API.

The fake shows what is recorded and what is not, and in which order; not what CUDA itself would refuse.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from graph import SHAPE, VP, FakeCuda, Net, conditions, cuda, oracle, plan, sampler

import fewstep as fs
from fewstep.solvers.run import graph as graph_module

__all__ = ["cuda"]  # the fixture, for every test


def recordable(info: fs.EditInfo) -> torch.Tensor:
    for slot in info.slots.values():
        slot.mul_(0.75)
    return 0.9 * info.x + 0.125 * info.to.sigma * info.normals() + 0.01 * info.cond[-1].get("c", torch.zeros(1)).mean()


def pulled(info: fs.EditInfo) -> torch.Tensor:
    return 0.5 * info.x0 + 0.1 * info.normals(fixed=True)


def syncing(info: fs.EditInfo) -> torch.Tensor | None:
    return 0.5 * info.x if info.x.abs().max().item() > 0.0 else None


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "unipc", "heun", "edm"])
@pytest.mark.parametrize("edit_x0", [None, pulled], ids=["x", "x and x0"])
@pytest.mark.parametrize("every", ["step", "stage"])
def test_eager_edits_are_the_oracles_bits(solver: str, edit_x0: Any, every: str) -> None:
    made = plan(3, solver, sigma_max=20.0)
    edits: dict[str, Any] = {"edit": recordable, "edit_x0": edit_x0, "every": every}
    assert torch.equal(sampler(Net(), made, "off")(seed=3, **edits), oracle(made)(seed=3, **edits))


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_the_next_model_input_is_the_stages(kind: str) -> None:
    denoiser = fs.Denoiser(Net(), fs.EDM(), "edm", dtype=kind)  # c_in is not 1
    made = fs.plan("heun", fs.grid(fs.EDM(), 4))
    ours = fs.Sampler(denoiser, made, SHAPE, backend="triton", device="cpu", graph="off")
    assert torch.equal(ours(seed=0, edit=lambda info: info.x, every="stage"), ours(seed=0))


@pytest.mark.parametrize("edit_x0", [None, pulled], ids=["x", "x and x0"])
def test_an_edit_of_torch_operators_is_recorded(edit_x0: Any, cuda: FakeCuda) -> None:
    """One launch a sample, with the seeds, latents and conditions of each call."""
    edits: dict[str, Any] = {"edit": recordable, "edit_x0": edit_x0}
    net = Net()
    for mode in ("loop", "auto"):
        made, want = sampler(net, plan(), mode, guidance=2.0), oracle(plan(), 2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cond = conditions(0.1, 0.5)
            assert torch.equal(made(seed=1, cond=cond, **edits), want(seed=1, cond=cond, **edits))
            cuda.log.clear()
            calls = net.calls
            for seed, other in ((2, conditions(-0.3, 0.2)), ([5, 2**40], cond)):
                assert torch.equal(made(seed=seed, cond=other, **edits), want(seed=seed, cond=other, **edits))
            assert cuda.log == ["replay", "replay"]
            assert net.calls == calls
            # Without edits there is another graph, and the first is kept.
            assert torch.equal(made(seed=1, cond=cond), want(seed=1, cond=cond))
            cuda.log.clear()
            made(seed=1, cond=cond, **edits)
            assert cuda.log == ["replay"]


def test_another_plan_is_recorded_again(cuda: FakeCuda) -> None:
    """An edit's points are Python's numbers, which a graph fixes."""
    made = sampler(Net(), plan(), "loop")
    made(seed=1, edit=recordable)
    later = plan(rho=3.0)
    made.update(later)
    assert torch.equal(made(seed=1, edit=recordable), oracle(later)(seed=1, edit=recordable))
    assert cuda.log.count("record") == 2


def test_an_edit_that_waits_runs_between_the_graphs_of_steps(cuda: FakeCuda) -> None:
    made, want = sampler(Net(), plan(), "auto"), oracle(plan())
    made(seed=1)
    with pytest.warns(RuntimeWarning, match="falls back to 'step' with edit syncing: the model or its edits cannot be"):
        found = made(seed=1, edit=syncing)
    assert torch.equal(found, want(seed=1, edit=syncing))
    with warnings.catch_warnings():  # one warning
        warnings.simplefilter("error")
        cuda.log.clear()
        assert torch.equal(made(seed=2, edit=syncing), want(seed=2, edit=syncing))
        assert cuda.log == ["replay"] * 3
        cuda.log.clear()
        assert torch.equal(made(seed=2), want(seed=2))  # and the plain loop is as before
        assert cuda.log == ["replay"]
    with pytest.raises(graph_module.CaptureError, match="the model or its edits cannot be captured"):
        sampler(Net(), plan(), "loop")(seed=1, edit=syncing)
    stepped = sampler(Net(), plan(), "step")
    assert torch.equal(stepped(seed=1, edit=recordable), want(seed=1, edit=recordable))


def test_predictions_are_not_edited_in_graphs_of_steps(cuda: FakeCuda) -> None:
    def waits(info: fs.EditInfo) -> torch.Tensor:
        return info.x0 * (0.5 if info.x0.sum().item() else 1.0)

    made = sampler(Net(), plan(), "auto")
    with pytest.warns(RuntimeWarning, match="falls back to 'off' with edit waits"):
        found = made(seed=1, edit_x0=waits)
    assert torch.equal(found, oracle(plan())(seed=1, edit_x0=waits))
    with pytest.raises(ValueError, match="edit_x0 acts inside of a call's update"):
        sampler(Net(), plan(), "step")(seed=1, edit_x0=waits)


def test_long_calls_are_not_recorded_for_an_edit_of_x(cuda: FakeCuda) -> None:
    """ "auto" runs it between the graphs of steps; one of a prediction has only the loop."""
    cuda.milliseconds = 1.1
    made, want = sampler(Net(), plan(), "auto"), oracle(plan())
    for edits, replays in (({"edit": recordable}, 3), ({"edit_x0": pulled}, 1)):
        cuda.log.clear()
        assert torch.equal(made(seed=1, **edits), want(seed=1, **edits))
        assert cuda.log.count("replay") == replays


def test_a_while_node_has_no_edits(cuda: FakeCuda) -> None:
    with pytest.raises(ValueError, match="graph='while' repeats one step, and edits see each"):
        sampler(Net(), plan(), "while")(seed=1, edit=recordable)


def test_ready_made_edits(cuda: FakeCuda) -> None:
    """Those of torch operators are recorded; an alignment's SVD and a quantile on the host are not."""
    mask, image = torch.tensor([[[0.0, 1.0, 1.0]]]), torch.ones(SHAPE)
    for edit in (fs.edits.Inpaint(mask, image, start=True), fs.edits.Clamp()):
        made = sampler(Net(), plan(), "loop")
        assert torch.equal(made(seed=1, edit=edit, edit_x0=edit), oracle(plan())(seed=1, edit=edit, edit_x0=edit))
        cuda.log.clear()
        assert torch.equal(made(seed=2, edit=edit, edit_x0=edit), oracle(plan())(seed=2, edit=edit, edit_x0=edit))
        assert cuda.log == ["replay"]


def test_adaptive_edits_on_the_fused_kernels() -> None:
    options: dict[str, Any] = {"shape": SHAPE, "seed": 4, "device": "cpu", "sigma_max": 5.0, "sigma_min": 0.1,
                               "edit": recordable, "edit_x0": pulled}  # fmt: skip
    ours, theirs = (fs.sample_adaptive(fs.Denoiser(Net(), VP), backend=b, **options) for b in ("triton", "naive"))
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-5, atol=1e-5)
    assert ours.nfe.tolist() == theirs.nfe.tolist()
