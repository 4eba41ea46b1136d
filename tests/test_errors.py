"""Bad arguments: one clear exception each, that names the argument, before the model is called.

Every model here fails the test when it is called.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.rows import run_plan

import fewstep as fs
from fewstep.solvers.plans.registry import get_solver

VP = fs.VP.linear()


def never(x: Any, t: Any, **cond: Any) -> Any:
    raise AssertionError("the model was called")


class Never(torch.nn.Module):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, device=device))

    def forward(self, x: Any, t: Any, **cond: Any) -> Any:
        raise AssertionError("the model was called")


DENOISER = fs.Denoiser(never, VP)
GUIDED = fs.Denoiser(never, VP, guidance=2.0)
PLAN = fs.plan("ddpm", fs.grid(VP, 3))


def sample(**arguments: Any) -> Any:
    arguments = {"denoiser": DENOISER, "shape": (2, 3), "steps": 3, "seed": 0, **arguments}
    return fs.sample(arguments.pop("denoiser"), **{k: v for k, v in arguments.items() if v is not ...})


def sampler(denoiser: Any = DENOISER, shape: Any = (2, 3), **arguments: Any) -> fs.Sampler:
    call = {k: arguments.pop(k) for k in ("x", "out", "cond", "callback", "noise", "seed") if k in arguments}
    made = fs.Sampler(denoiser, arguments.pop("plan", PLAN), shape, **arguments)
    return made(**{"seed": 0, **call})


def refused(error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=text) as caught:
        call()
    assert not isinstance(caught.value, AssertionError)


# --- the error list of the design, one by one ---


def name_of(value):
    """A parameter in a test's name, without addresses: they differ between processes."""
    return "" if isinstance(value, type) else re.sub(r" at 0x[0-9a-f]+", "", str(value))[:60]


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"solver": "dpmpp2m"}, ValueError, "unknown solver 'dpmpp2m': did you mean solver 'dpmpp_2m'"),
        ({"solver": "DDIM"}, ValueError, r"unknown solver 'DDIM': did you mean 'ddim'\?"),
        ({"solver": "qqqq"}, ValueError, "unknown solver 'qqqq': choose from .*ddim, .*ddpm"),
        ({"spacing": "karas"}, ValueError, "unknown spacing 'karas': did you mean 'karras'"),
        ({"steps": 0}, ValueError, "steps must be an int >= 1 and <= 1000000, got 0"),
        ({"steps": -3}, ValueError, r"steps must be an int .*, got -3"),
        ({"steps": 2.0}, ValueError, r"steps must be an int .*, got 2.0"),
        ({"steps": True}, ValueError, r"steps must be an int .*, got True"),
        ({"solver": "unipc", "order": 0}, ValueError, "order must be one of 1, 2, 3.*, got 0"),
        (
            {"solver": "unipc", "order": 5},
            ValueError,
            "order must be one of 1, 2, 3.*, got 5",
        ),  # not silently 3
        ({"solver": "unipc", "variant": "midpoint"}, ValueError, "variant must be one of 'bh1', 'bh2'"),
        ({"solver": "dpmpp_2m", "variant": "huen"}, ValueError, "variant must be one of .*got 'huen'"),
        (
            {"solver": "dpmpp_2m_sde", "order": 3},
            TypeError,
            "'dpmpp_2m_sde' has no option 'order'; it takes: .*eta",
        ),
        (
            {"solver": "ddpm", "variance_type": "fixed_large_log"},
            TypeError,
            "'ddpm' has no option 'variance_type'",
        ),
        ({"solver": "ddim", "eta": -0.5}, ValueError, "eta must be a number >= 0, got -0.5"),
        ({"solver": "ddim", "eta": math.nan}, ValueError, "eta must be a number >= 0, got nan"),
        ({"solver": "edm", "s_churn": -1.0}, ValueError, "s_churn must be"),
        ({"solver": "edm", "s_noise": math.inf}, ValueError, "s_noise must be finite"),
        (
            {"solver": "heun", "frame": "time"},
            ValueError,
            "frame must be one of 'sigma', 'flow'.*, got 'time'",
        ),
        ({"shape": (3,)}, ValueError, r"shape must be \(B, ...\) .*got \(3,\)"),
        ({"shape": ()}, ValueError, "shape must be"),
        ({"shape": (0, 3)}, ValueError, r"shape must be .*no empty axis, got \(0, 3\)"),
        ({"shape": (2, 0)}, ValueError, "no empty axis"),
        ({"shape": 4}, TypeError, "shape must be a sequence of ints"),
        ({"shape": (2, 2.5)}, TypeError, "shape must be a sequence of ints"),
        ({"shape": "23"}, TypeError, "shape must be a sequence of ints"),
        ({"shape": (True, 3)}, TypeError, "shape must be a sequence of ints"),
        ({"shape": b"\2\3"}, TypeError, "shape must be a sequence of ints"),
        ({"shape": {2: 3, 3: 4}}, TypeError, "shape must be a sequence of ints"),
        ({"shape": ...}, ValueError, "exactly one of x .* and shape .*neither"),
        ({"x": np.zeros((2, 3), np.float32)}, ValueError, "exactly one of x .* and shape .*both"),
        ({"x": [[0.0, 1.0]], "shape": ...}, TypeError, "x must be a NumPy array or a torch tensor, got list"),
        (
            {"x": np.zeros((2, 3), np.int64), "shape": ...},
            ValueError,
            "x has dtype int64; it must be one of float64",
        ),
        ({"x": np.zeros((2, 3), np.complex64), "shape": ...}, ValueError, "x has dtype complex64"),
        ({"x": np.zeros((2, 3), bool), "shape": ...}, ValueError, "x has dtype bool"),
        ({"x": np.zeros((0, 3), np.float32), "shape": ...}, ValueError, "no empty axis"),
        ({"x": torch.zeros(3), "shape": ...}, ValueError, r"shape must be \(B, ...\)"),
        ({"seed": -1}, ValueError, r"seed must be an integer with 0 <= seed < 2\*\*64, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be"),
        ({"seed": 1.5}, ValueError, "seed must be .*got 1.5 of type float"),
        ({"seed": [1, 2, 3]}, ValueError, "seed has 3 entries for a batch of 2"),
        ({"seed": [1, -2]}, ValueError, r"seed\[1\] must be"),
        ({"seed": [1, 2], "first_sample": 4}, ValueError, "first_sample=4 needs an int seed"),
        ({"first_sample": -1}, ValueError, "first_sample must be an integer with 0 <= first_sample"),
        ({"first_sample": 2**32 - 1}, ValueError, "first_sample="),
        ({"start": 1.0}, ValueError, "start = 1.0: tail takes 0 <= start < 1"),
        ({"start": math.nan}, ValueError, "start = nan"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        ({"dtype": "float16"}, ValueError, "dtype is the state's, float32 or float64, got float16"),
        ({"dtype": "flaot32"}, ValueError, "dtype 'flaot32' is not one of float32, float64$"),
        ({"dtype": "int8"}, ValueError, "dtype 'int8' is not one of float32, float64$"),
        ({"device": "gpu"}, ValueError, "device 'gpu' cannot be used"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99' cannot be used"),
        ({"device": "xpu:0"}, ValueError, "device 'xpu:0' cannot be used"),
        (
            {"denoiser": never},
            TypeError,
            r"denoiser must be a fewstep.Denoiser, got function: wrap the model",
        ),
        ({"grid": [1.0, 0.5, 0.0]}, TypeError, "grid must be a fewstep.Grid, got list"),
        ({"grid": fs.grid(fs.EDM(), 3)}, ValueError, r"made on EDM\(.*the denoiser was trained on VP\("),
        ({"callback": 3}, TypeError, "callback must be callable"),
        ({"noise": np.zeros((2, 3))}, TypeError, "noise must be callable"),
        ({"cond": torch.arange(2)}, TypeError, "cond must be a mapping .*got Tensor"),
        ({"cond": 5}, TypeError, "cond must be a mapping .*got int"),
        ({"cond": {"c": np.zeros(3)}}, ValueError, r"cond\['c'\] of branch 0 has shape \(3,\).*batch of 2"),
        ({"cond": {"c": np.zeros(())}}, ValueError, r"cond\['c'\] of branch 0 has shape \(\)"),
        ({"denoiser": GUIDED}, ValueError, "guidance over 2 branches needs cond as a sequence of 2 mappings"),
        (
            {"denoiser": GUIDED, "cond": {"c": np.zeros(2)}},
            ValueError,
            r"the null condition first, or Denoiser\(null=",
        ),
        ({"denoiser": GUIDED, "cond": [{}, {}, {}]}, ValueError, "guidance over 2 branches .*got 3"),
        ({"denoiser": GUIDED, "cond": [None, {}]}, TypeError, "cond must be a mapping .*NoneType, dict"),
        (
            {"denoiser": fs.Denoiser(never, VP, guidance=2.0, null={"c": np.zeros(1)})},
            ValueError,
            r"a branch of guidance has no condition and another has, \[\['c'\], \[\]\]: pass cond= ",
        ),
        (
            {"denoiser": GUIDED, "cond": [{"c": 1}, {"d": 1}]},
            ValueError,
            r"different conditions, \[\['c'\], \['d'\]\]",
        ),
        (
            {"denoiser": GUIDED, "cond": [{"c": 1}, {"c": 2}]},
            ValueError,
            r"cond\['c'\] differs between the branches",
        ),
        (
            {
                "denoiser": GUIDED,
                "x": np.zeros((2, 3)),
                "shape": None,
                "cond": [{"c": torch.zeros(2)}, {"c": torch.ones(2)}],
            },
            ValueError,
            r"cond\['c'\] differs between the branches and is not an array of numpy",
        ),
        (
            {"denoiser": GUIDED, "cond": [{"c": np.zeros((2, 1))}, {"c": np.zeros((2, 4))}]},
            ValueError,
            r"cond\['c'\] has different shapes in the branches, \[\(1,\), \(4,\)\]",
        ),
    ],
    ids=name_of,
)
def test_sample(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    refused(error, text, lambda: sample(**wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"plan": "ddpm"}, TypeError, "plan must come from fewstep.plan"),
        ({"denoiser": never}, TypeError, "denoiser must be a fewstep.Denoiser, got function"),
        (
            {"denoiser": fs.Denoiser(never, fs.Flow())},
            ValueError,
            r"plan was made on VP\(.*trained on Flow\(",
        ),
        ({"shape": (2,)}, ValueError, "shape must be"),
        ({"backend": "triton"}, ValueError, "backend='triton' is not available here: it runs on torch tensors"),
        ({"backend": "nubma"}, ValueError, "unknown backend 'nubma': did you mean 'numba'"),
        ({"graph": "lop"}, ValueError, "unknown graph mode 'lop': did you mean 'loop'"),
        ({"graph": "step"}, ValueError, "graph='step' needs a CUDA device"),
        ({"dtype": "bfloat16"}, ValueError, "dtype is the state's"),
        ({"dtype": torch.int64}, ValueError, "dtype is the state's, float32 or float64, got int64"),
        (
            {"x": np.zeros((2, 4), np.float32)},
            ValueError,
            r"x has shape \(2, 4\), the sampler was made for \(2, 3\)",
        ),
        ({"x": np.zeros((3, 3), np.float32)}, ValueError, r"x has shape \(3, 3\)"),
        (
            {"x": np.zeros((2, 3))},
            ValueError,
            "x is float64 and the sampler's state float32: pass dtype='float64'",
        ),
        ({"x": "noise"}, TypeError, "got str: a shape goes to shape=, a seed to seed=, conditions to cond="),
        ({"x": np.zeros((2, 3), object)}, ValueError, "x has dtype object"),
        ({"out": np.zeros((2, 4), np.float32)}, ValueError, r"out must be an array of shape \(2, 3\)"),
        ({"out": torch.zeros(2, 3)}, ValueError, r"own library, got Tensor of shape \(2, 3\)"),
        ({"out": np.zeros((2, 3), np.int32)}, ValueError, "out has dtype int32"),
        ({"out": 1.0}, ValueError, "out must be an array"),
        ({"seed": "0"}, ValueError, "seed must be"),
        ({"x": np.zeros((2, 3), np.float32), "seed": 2.5}, ValueError, "seed must be"),
        ({"callback": "f"}, TypeError, "callback must be callable"),
        ({"noise": 1}, TypeError, "noise must be callable"),
    ],
    ids=name_of,
)
def test_sampler(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    refused(error, text, lambda: sampler(**wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"guidance": 10**400}, ValueError, "guidance scale must be a finite number"),
        ({"model": 3}, TypeError, "model must be callable as model"),
        ({"process": "vp"}, TypeError, "process must be a fewstep process .*got str"),
        ({"predicts": "eps"}, ValueError, "unknown prediction type 'eps'"),
        ({"predicts": ["v"]}, ValueError, "unknown prediction type"),
        ({"guidance": "2"}, TypeError, "guidance must be a number .*got '2'"),
        ({"guidance": True}, TypeError, "guidance must be a number"),
        ({"guidance": (1.0, 2.0)}, TypeError, "guidance must be a number .*a CFG"),
        ({"guidance": math.nan}, ValueError, "guidance scale must be a finite number"),
        ({"clip": 0.0}, ValueError, "clip must be a positive bound"),
        ({"clip": math.inf}, ValueError, "clip must be a positive bound"),
        ({"clip": True}, ValueError, "clip must be a positive bound"),
        (
            {"clip": "dynamic"},
            ValueError,
            "clip must be a positive bound on .x0. or a DynamicThreshold, got 'dynamic'",
        ),
        ({"null": 0}, TypeError, "null must be a mapping .*got int"),
        ({"time_scale": 0.0}, ValueError, "time_scale must be a positive finite number, got 0.0"),
        ({"time_scale": math.inf}, ValueError, "time_scale must be"),
        ({"dtype": "int64"}, ValueError, "dtype of x_in must be one of float64"),
        ({"dtype": "half"}, ValueError, "^$"),
        ({"time_dtype": "float33"}, ValueError, "dtype 'float33' is not one of"),
        ({"sigma_data": 0.0}, ValueError, "sigma_data must be a positive finite number"),
    ],
    ids=name_of,
)
def test_denoiser(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    if wrong == {"dtype": "half"}:  # NumPy's own name for float16
        assert fs.Denoiser(never, VP, dtype="half").dtype == "float16"
        return
    arguments = {"model": never, "process": VP, **wrong}
    refused(error, text, lambda: fs.Denoiser(arguments.pop("model"), arguments.pop("process"), **arguments))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fs.CFG(math.inf), "guidance scale must be a finite number"),
        (lambda: fs.CFG("2"), "guidance scale must be a finite number"),
        (lambda: fs.CFG(True), "guidance scale must be a finite number"),
        (lambda: fs.CFG(()), "guidance scale takes one number or a pair"),
        (lambda: fs.CFG((1.0, 2.0, 3.0)), "guidance scale takes one number or a pair"),
        (lambda: fs.CFG(2.0, rescale=1.5), "guidance rescale must be a number from 0 to 1, got 1.5"),
        (lambda: fs.CFG(2.0, rescale=math.nan), "guidance rescale"),
        (lambda: fs.CFG(2.0, start=-0.1), "guidance start"),
        (lambda: fs.CFG(2.0, start=0.6, stop=0.5), "guidance stop must be a number from 0.6 to 1, got 0.5"),
        (lambda: fs.DynamicThreshold(1.5), "quantile must be a number from 0 to 1, got 1.5"),
        (lambda: fs.DynamicThreshold(0.9, 0.5), r"maximum must be a number from 1 to 1e\+12, got 0.5"),
    ],
)
def test_guidance_and_clip(make: Callable[[], Any], text: str) -> None:
    refused(ValueError, text, make)


# --- grids: NaN, inf, duplicates ---


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: fs.Grid.from_sigmas(VP, [5.0, math.nan, 0.0]), r"ratios\[1\] = nan is NaN"),
        (lambda: fs.Grid.from_sigmas(VP, [math.inf, 1.0, 0.0]), r"ratio\[0\] = inf is outside"),
        (lambda: fs.Grid.from_sigmas(VP, [1.0, 2.0]), r"ratios\[1\] = 2.0 is not below ratios\[0\] = 1.0"),
        (lambda: fs.Grid.from_sigmas(VP, [1.0, -0.5]), "is outside"),
        (lambda: fs.Grid.from_sigmas(VP, [1.0]), r"ratios has shape \(1,\)"),
        (lambda: fs.Grid.from_times(VP, [999, 500, 500, -1]), r"t\[2\] = 500.0 is not below t\[1\] = 500.0"),
        (lambda: fs.Grid.from_times(VP, [999, math.inf]), r"t\[1\] = inf is not finite"),
        (lambda: fs.Grid.from_times(VP, [1500, 0]), r"t\[0\] = 1500.0 is outside"),
        (lambda: fs.Grid.from_times(VP, "all"), "t = 'all' is not a number or an array of numbers"),
        (lambda: fs.grid(fs.VP.linear(timesteps=10), 15, "linspace", round_times=True), "steps = 15"),
        (lambda: fs.grid(VP, 5, "karras", sigma_min=math.nan), "sigma_min = nan"),
        (lambda: fs.grid(VP, 5, "karras", rho=0.0), "rho = 0.0: it must be positive"),
    ],
)
def test_grids(make: Callable[[], Any], text: str) -> None:
    refused(ValueError, text, make)


@pytest.mark.parametrize("steps", [3, 0])
def test_a_grid_of_no_process(steps: int) -> None:
    for bad in (None, "vp", fs.VP, [0.5]):
        with pytest.raises(TypeError, match="process must be a fewstep process"):
            fs.grid(bad, steps)  # type: ignore[arg-type]


def test_a_solver_by_an_array_or_a_list() -> None:
    for bad in (np.zeros((2, 2)), np.zeros(0), ["euler"]):
        with pytest.raises(ValueError, match="unknown solver"):
            fs.plan(bad, fs.grid(VP, 2))  # type: ignore[arg-type]


def test_ints_beyond_float() -> None:
    huge: Any = 10**400
    with pytest.raises(TypeError, match="mask must be an array"):
        fs.edits.Inpaint(huge, np.zeros(2))
    with pytest.raises(TypeError, match="image must be an array"):
        fs.edits.Inpaint(np.zeros(2), huge)
    denoiser, ends = fs.Denoiser(lambda x, t: 0.1 * x, VP), {"sigma_max": 2.0, "sigma_min": 0.5}
    runs = [
        fs.sample_adaptive(denoiser, np.ones((1, 3)), **ends, max_calls=most, max_attempts=most)  # type: ignore[arg-type]
        for most in (1000, huge)
    ]
    assert runs[0].x.tobytes() == runs[1].x.tobytes()


def test_an_unknown_spacing_option_is_named() -> None:
    refused(
        TypeError, "spacing 'karras' takes no option 'rh0'; it takes .*rho", lambda: fs.grid(VP, 5, "karras", rh0=7.0)
    )


# --- ends of the noise range ---


@pytest.mark.parametrize("final_order", [None, 2, 3])
@pytest.mark.parametrize("solver", ["unipc", "dpmpp_2m", "dpmpp_2m_sde"])
def test_a_step_to_sigma_zero_cannot_be_forced_to_a_high_order(solver: str, final_order: int | None) -> None:
    """diffusers' UniPC with lower_order_final=False returns NaN. Here final_order is an upper limit, and the step to
    sigma 0 is always x' = m."""
    options: dict[str, Any] = {"order": 3} if solver == "unipc" else {}
    if final_order == 3 and solver != "unipc":
        refused(ValueError, "final_order must be one of", lambda: fs.plan(solver, fs.grid(VP, 6), final_order=3))
        return
    plan = fs.plan(solver, fs.grid(VP, 6, "karras"), final_order=final_order, **options)
    assert {s: c for s, c in plan.stages[-1].rows["x"].items() if c} == {"m": 1.0}
    open_end = fs.plan(solver, fs.grid(VP, 6, "karras", final_zero=False), final_order=final_order, **options)
    assert len([c for s, c in open_end.stages[-1].rows["x"].items() if c and s.startswith("h")]) > 0


def test_epsilon_at_alpha_zero() -> None:
    for process, instead in ((fs.Flow(), "predicts='flow'"), (VP.zero_terminal_snr(), "use a model with predicts='v'")):
        refused(
            ValueError,
            rf"predicts='epsilon' does not determine x0 at alpha = 0 \(t = .*{instead}",
            lambda p=process: sample(denoiser=fs.Denoiser(never, p), spacing="linspace"),
        )


# --- mixed devices ---


def test_devices_must_agree() -> None:
    cpu, meta = Never(), Never("meta")
    refused(ValueError, "device='meta', but the model is on cpu", lambda: sample(
        denoiser=fs.Denoiser(cpu, VP), x=torch.zeros(2, 3, device="meta"), shape=...))  # fmt: skip
    refused(ValueError, "device='meta', but the model is on cpu", lambda: sample(
        denoiser=fs.Denoiser(cpu, VP), device="meta"))  # fmt: skip
    refused(ValueError, "x is on meta, the model on cpu: move one of them", lambda: sampler(
        fs.Denoiser(cpu, VP), x=torch.zeros(2, 3, device="meta")))  # fmt: skip
    refused(ValueError, "x is on cpu, the model on meta: move one of them", lambda: sampler(
        fs.Denoiser(meta, VP), x=torch.zeros(2, 3)))  # fmt: skip
    refused(ValueError, "backend='numba' runs on the CPU, the model is on meta", lambda: sampler(
        fs.Denoiser(meta, VP), backend="numba"))  # fmt: skip
    refused(ValueError, r"cond\['c'\] of branch 1 is on meta, the model on cpu", lambda: sampler(
        fs.Denoiser(cpu, VP, guidance=2.0),
        cond=({"c": torch.zeros(2)}, {"c": torch.zeros(2, device="meta")})))  # fmt: skip
    refused(ValueError, "out is on meta", lambda: sampler(
        fs.Denoiser(cpu, VP), out=torch.zeros(2, 3, device="meta")))  # fmt: skip


# --- errors of the model's output, raised at the first call ---


@pytest.mark.parametrize("backend", ["numba", "naive"])
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda x: x[:, :2], r"the model returned shape \(2, 2\) for x of shape \(2, 3\)"),
        (lambda x: x[:1], r"the model returned shape \(1, 3\)"),
        (lambda x: (x,), "the model returned tuple, not an array of numpy"),
        (lambda x: None, "the model returned NoneType"),
        (lambda x: 0.5, "the model returned float"),
        (lambda x: x.astype(np.int32), "the model returned dtype int32; it must be one of"),
        (lambda x: x + 1j, "the model returned dtype complex"),
    ],
)
def test_what_the_model_returns(answer: Callable[[Any], Any], text: str, backend: str) -> None:
    denoiser = fs.Denoiser(lambda x, t: answer(x), VP)
    refused(ValueError, text, lambda: sampler(denoiser, backend=backend))
    # The same error in a later call.
    calls = []

    def later(x: Any, t: Any) -> Any:
        calls.append(1)
        return answer(x) if len(calls) == 2 else x

    refused(ValueError, text, lambda: sampler(fs.Denoiser(later, VP), backend=backend))


def test_a_tensor_without_memory_is_refused_at_any_call() -> None:
    """Also after plain ones: its address is 0."""

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner: torch.Tensor) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0]  # of x.detach()

    calls = iter(range(9))
    model = fs.Denoiser(lambda x, t: Wrapper(x) if next(calls) else 0.1 * x, fs.VP.linear())
    with pytest.raises(TypeError, match="Wrapper has no memory of its own"):
        fs.sample(model, torch.ones(2, 3), steps=3)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda x: x[:2], r"the model returned shape \(2, 3\) for a batch of 2 branches of 2"),
        (
            lambda x: np.concatenate([x, x]),
            r"the model returned shape \(8, 3\) for a batch of 2 branches of 2",
        ),
        (lambda x: None, "the model returned NoneType, not an array of numpy"),
        (lambda x: (x, x), r"the model returned tuple, not an array of numpy.*model\(x, t, \*\*cond\)\[0\]"),
    ],
)
def test_what_a_guided_model_returns(answer: Callable[[Any], Any], text: str) -> None:
    refused(
        ValueError,
        text,
        lambda: sampler(fs.Denoiser(lambda x, t: answer(x), VP, guidance=2.0), cond=({}, {})),
    )


def test_outside_noise_of_the_wrong_shape() -> None:
    denoiser = fs.Denoiser(lambda x, t: x, VP)
    noise = lambda draw, at, to, shape: np.zeros((2, 4))  # noqa: E731
    refused(ValueError, r"noise returned shape \(2, 4\) for draw 1; the sample has shape \(2, 3\)",
            lambda: sampler(denoiser, noise=noise))  # fmt: skip


# --- arguments that other libraries accept silently ---


@pytest.mark.parametrize("solver", fs.list_solvers())
def test_one_step_of_every_solver_works(solver: str) -> None:
    """k-diffusion's SDE samplers fail on a single step."""
    plan = fs.plan(solver, fs.grid(VP, 1))
    rng = np.random.default_rng(0)
    x, *z = rng.standard_normal((2 + plan.nfe, 4, 3))
    want, _ = run_plan(plan, lambda v, at: np.tanh(v), x, lambda draw: z[draw])
    made = fs.Sampler(
        fs.Denoiser(lambda v, t: np.tanh(v), VP, "sample"), plan, (4, 3), dtype="float64", backend="naive"
    )
    found = made(x, noise=lambda draw, at, to, shape: z[draw])
    assert np.isfinite(want).all()
    np.testing.assert_allclose(found, want, atol=1e-12 * max(1.0, np.abs(want).max()))


def test_a_plan_leaves_the_grid_and_its_options_as_they_were() -> None:
    """diffusers writes the config from set_timesteps(mu=) and from singlestep's lower_order_final."""
    grid = fs.grid(VP, 6, "karras")
    before = (grid.t.tobytes(), grid.alpha.tobytes(), grid.sigma.tobytes())
    options = {"order": 3, "variant": "bh1"}
    plan = fs.plan("unipc", grid, **options)
    assert options == {"order": 3, "variant": "bh1"}
    assert plan.options["order"] == 3
    assert (grid.t.tobytes(), grid.alpha.tobytes(), grid.sigma.tobytes()) == before
    with pytest.raises(ValueError, match="read-only"):
        grid.sigma[0] = 1.0


@pytest.mark.parametrize("solver", fs.list_solvers())
def test_a_start_part_way_has_no_history_that_was_never_made(solver: str) -> None:
    """diffusers' LMS uses order-4 weights with one derivative there. Here a constant x0 must stay exact, and
    so must the starting noise where the plan adds none."""
    grid = fs.grid(VP, 10, "karras").tail(0.5)
    plan = fs.plan(solver, grid)
    x0 = np.full((1, 4), 0.7)
    constant = fs.Denoiser(lambda x, t: x0, VP, "sample")
    x = plan.start.alpha * x0 + plan.start.sigma * np.ones((1, 4))
    y = fs.Sampler(constant, plan, (1, 4), dtype="float64", backend="naive")(x, seed=0)
    to = plan.stages[-1].to
    if all(stage.exact for stage in plan.stages) and (to.sigma == 0.0 or not plan.stochastic):
        np.testing.assert_allclose(y, to.alpha * x0 + to.sigma, atol=1e-9)


# --- any bad value of any argument ---

numbers = st.one_of(st.floats(), st.integers(-(2**70), 2**70))
things = st.one_of(st.none(), st.text(max_size=6), st.binary(max_size=3), st.lists(st.integers(), max_size=3),
                   st.just(object()), st.just({}), st.complex_numbers())  # fmt: skip
words = st.text(min_size=1, max_size=12)

BAD: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.one_of(st.floats(), st.integers(max_value=0), st.booleans(), things),
    "spacing": st.one_of(words.filter(lambda w: w not in fs.list_spacings()), numbers, st.just([])),
    "solver": st.one_of(words.filter(lambda w: w not in fs.list_solvers()), numbers, st.none(), st.just([])),
    "seed": st.one_of(
        st.integers(max_value=-1),
        st.integers(min_value=2**64),
        st.floats(),
        st.booleans(),
        things.filter(lambda v: v is not None and not isinstance(v, list)),
        st.lists(st.integers(0, 9)).filter(lambda v: len(v) != 2),
        st.tuples(st.integers(0, 9), st.integers(-9, -1)),
    ),
    "shape": st.one_of(
        numbers,
        things.filter(lambda v: v is not None and not isinstance(v, (list, bytes))),
        st.lists(st.integers(-3, 0), min_size=1, max_size=4),
        st.lists(st.integers(1, 4), max_size=1),
        st.lists(st.floats(1, 4), min_size=2, max_size=3),
    ),
    "start": st.one_of(st.floats().filter(lambda v: not 0.0 <= v < 1.0), st.integers(min_value=1), words, st.just([1])),
    "first_sample": st.one_of(st.integers(max_value=-1), st.integers(min_value=2**32 - 1), st.just(1.5), words),
    "backend": st.one_of(words.filter(lambda w: w not in ("auto", "naive", "numba")), numbers),
    "dtype": st.one_of(
        st.text("abcdegijkmnopqrtuvwxyz", min_size=2, max_size=9),  # no name of NumPy's is spelt without f, h, l, s
        st.sampled_from(["int64", "float16", "bfloat16", "complex128", "datetime64", torch.int8, 3.5, "torch"]),
    ),
    "device": st.one_of(words.filter(lambda w: not w.startswith(("cpu", "meta"))), st.floats(min_value=1.5)),
    "callback": st.one_of(words, st.integers(1)),
    "noise": st.one_of(words, st.integers(1), st.just(np.zeros((2, 3)))),
    "cond": st.one_of(st.integers(1), words, st.floats(min_value=1.0), st.lists(st.integers(), min_size=1)),
}
OPTIONS: dict[str, tuple[str, st.SearchStrategy[Any]]] = {
    "eta": ("ddim", st.one_of(st.floats(max_value=-1e-9), st.just(math.nan), things)),
    "order": ("unipc", st.one_of(numbers.filter(lambda v: v not in range(1, 9)), st.just(2.0), things)),
    "variant": (
        "dpmpp_2m",
        st.one_of(words.filter(lambda w: w not in ("midpoint", "heun")), numbers, things),
    ),
    "s_churn": ("edm", st.one_of(st.floats(max_value=-1e-9), st.just(math.nan), things)),
    "s_noise": ("ddpm", st.one_of(st.floats(max_value=-1e-9), st.sampled_from([math.nan, math.inf]), things)),
    "frame": (
        "heun",
        st.one_of(words.filter(lambda w: w not in ("sigma", "flow", "logsnr")), numbers, st.just([])),
    ),
    "sigma_min": (
        "consistency",
        st.one_of(st.floats(max_value=-1e-9), st.just(math.nan), st.just(1e9), words),
    ),
}


@pytest.mark.parametrize("name", BAD)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_bad_argument_is_named(name: str, data: st.DataObject) -> None:
    value = data.draw(BAD[name])
    with pytest.raises((ValueError, TypeError)) as caught:
        sample(**{"solver": "ddpm", name: value})
    assert name in str(caught.value)
    assert type(caught.value) in (ValueError, TypeError, fs.PlanError)


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_bad_option_is_named(name: str, data: st.DataObject) -> None:
    solver, values = OPTIONS[name]
    value = data.draw(values)
    with pytest.raises((ValueError, TypeError)) as caught:
        sample(**{"solver": solver, name: value})
    assert name in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(name=st.from_regex(r"[a-z_]{3,9}", fullmatch=True), solver=st.sampled_from(fs.list_solvers()))
def test_any_unknown_option_is_named(name: str, solver: str) -> None:
    taken = set(inspect.signature(fs.sample).parameters) | {"s_noise"}
    if name in taken | set(get_solver(solver).options):
        return
    refused(
        TypeError,
        f"solver '{solver}' has no option '{name}'; it takes: ",
        lambda: sample(solver=solver, **{name: 1}),
    )


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    kind=st.sampled_from(["float32", "float64", "int32", "uint8", "complex64", "bool", "float16"]),
)
def test_a_latent_of_another_shape_or_dtype_is_named(shape: list[int], kind: str) -> None:
    if (tuple(shape), kind) in (((2, 3), "float32"), ((2, 3), "float16")):
        return
    refused(ValueError, "^x (has|is) ", lambda: sampler(x=np.zeros(shape, kind)))
