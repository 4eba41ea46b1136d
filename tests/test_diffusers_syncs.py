"""No call of a twin waits for its device or copies to it, once the same call was made before.

A device is simulated: its tensors are plain ones on the CPU, in a register, and say that they are on a CUDA device. All
operators run as usual, so that a run has its true numbers, and whatever crosses between host and device is noted.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers_cases import GENERAL, make
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.bindings import diffusers as twins
from fewstep.bindings.diffusers import noise, threads, transition
from fewstep.bindings.diffusers.added import method_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Should have:UserWarning"),
]

CUDA, CPU, SHAPE = torch.device("cuda", 0), torch.device("cpu"), (2, 3, 4, 4)

EULER, UNIPC = "EulerDiscreteScheduler", "UniPCMultistepScheduler"

# Operators that answer on the host, or whose result's shape depends on elements.
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive"}


class Device(TorchDispatchMode):
    """What crosses between host and device."""

    def __init__(self) -> None:
        super().__init__()
        # torch must not look for a GPU.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.crossed: list[str] = []
        self.storages: dict[int, Any] = {}  # kept alive, so that none is taken for another
        self.running = False

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().partition("::")[2].partition(".")[0]
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        held = [self.holds(leaf) for leaf in leaves]
        remote = there = any(held)
        asked = kwargs.get("device")
        if asked is not None:
            there = torch.device(asked).type == "cuda"
            kwargs["device"] = CPU
        if remote and name in WAITS:
            self.crossed.append(name)
            there = False
        elif leaves and name == "_to_copy" and remote != there:
            self.crossed.append("a copy to the device" if there else "a copy from the device")
        elif name == "copy_" and held[0] != held[1]:
            self.crossed.append("copy_")
        elif name == "index" and remote and not all(held):
            self.crossed.append("indices from the host")
        else:
            assert not remote or all(h or not leaf.ndim for h, leaf in zip(held, leaves, strict=True)), name
        self.running = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.running = False
        if there:
            pytree.tree_map_only(torch.Tensor, self.put, result)
        return result


def to_host(*args: Any, **kwargs: Any) -> bool:
    """Whether arguments of `Tensor.to` name the CPU."""
    for value in (*args, *kwargs.values()):
        kind = value.device.type if isinstance(value, torch.Tensor) else None
        if isinstance(value, (str, torch.device)):
            kind = torch.device(value).type
        if kind == "cpu":
            return True
    return False


@contextlib.contextmanager
def suspended(mode: Device) -> Iterator[None]:
    mode.running, before = True, mode.running
    try:
        with torch.utils._python_dispatch._disable_current_modes():
            yield
    finally:
        mode.running = before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    states = transition._States()  # what is learned of these tensors no other test must find
    monkeypatch.setattr(transition, "STATES", states)
    monkeypatch.setattr(threads, "STATES", states)
    mode = Device()
    base = {name: getattr(torch.Tensor, name) for name in ("device", "is_cuda", "is_cpu")}

    def simulated(name: str, value: object) -> property:
        def read(self: torch.Tensor) -> Any:
            there = not mode.running and mode.holds(self)
            return value if there else base[name].__get__(self)

        return property(read)

    for name, value in (("device", CUDA), ("is_cuda", True), ("is_cpu", False)):
        monkeypatch.setattr(torch.Tensor, name, simulated(name, value), raising=False)
    for name in ("tolist", "numpy", "cpu", "to"):
        method = getattr(torch.Tensor, name)

        def noted(self: torch.Tensor, *args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
            if mode.running or not mode.holds(self) or (name == "to" and not to_host(*args, **kwargs)):
                return method(self, *args, **kwargs)
            assert name != "numpy", "torch refuses this"
            mode.crossed.append(name)
            with suspended(mode):
                return method(self.clone(), *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noted)
    plain = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type == "cpu":
            return plain(*args, device=device, **kwargs)
        mode.crossed.append("a tensor from host numbers")
        with suspended(mode):
            return mode.put(plain(*args, **kwargs))

    monkeypatch.setattr(torch, "tensor", tensor)
    with mode:
        yield mode


def test_the_simulation(device: Device) -> None:
    """It notes what it should."""
    x = torch.arange(4.0).to("cuda:0")
    assert device.crossed == ["a copy to the device"]
    assert x.device == CUDA
    assert not x.is_cpu
    y = torch.ones(4, device="cuda:0") + 2.0 * x[1:].sum()
    assert y.is_cuda
    assert y.clone().device == CUDA
    assert len(device.crossed) == 1
    waits: list[Callable[[], object]] = [
        lambda: x[1].item(),
        lambda: float(x[2]),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.to(torch.ones(1)),
        lambda: x.nonzero(),
    ]
    for wait in waits:
        before = len(device.crossed)
        wait()
        assert len(device.crossed) == before + 1
    with pytest.raises(AssertionError):
        x + torch.ones(4)


def calls(library: Any, name: str, place: str, scheduler: Any = None, **config: Any) -> tuple[torch.Tensor, Any]:
    """Everything that a pipeline calls: noise on an image, then a run of all its steps, with noise for inpainting."""
    if scheduler is None:
        scheduler = make(library, name, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(4, device=place)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x, zero = torch.ones(SHAPE, device=place), torch.zeros(SHAPE, device=place)
    times = scheduler.timesteps[:1].repeat(len(x))
    adding = method_of(type(scheduler))
    if adding == "add_noise":
        x = scheduler.add_noise(0.5 * x, x, times)
    elif adding == "scale_noise":
        x = scheduler.scale_noise(0.5 * x, times, x)
    options: dict[str, Any] = {"return_dict": False}
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.sin(x_in), t, x, **options)[0]
        if adding == "add_noise":
            x = x + 0.01 * scheduler.add_noise(zero, x, times)
    return x, scheduler


# Of DPM-Solver SDE's Brownian path every draw is made on the CPU, as in diffusers.
ON_DEVICE = [name for name in GENERAL if name != "DPMSolverSDEScheduler"]


@pytest.mark.parametrize("drawn", ["torch", "fewstep"])
@pytest.mark.parametrize("name", ON_DEVICE)
def test_a_run_crosses_nothing(name: str, drawn: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its schedule and states are known; and its numbers are those of diffusers on the CPU."""
    monkeypatch.setattr(noise, "take_seed", lambda generator, device: 5)
    twin, crossed = None, []
    with torch.no_grad():
        for _ in range(4):
            device.crossed.clear()
            torch.manual_seed(0)
            end, twin = calls(twins, name, "cuda:0", twin, noise=drawn)
            crossed.append(len(device.crossed))
        assert crossed[0] > 0
        # Singlestep writes into its configuration in its first run, which makes the second another one.
        assert crossed[1 + (name == "DPMSolverSinglestepScheduler") :] in ([0, 0, 0], [0, 0]), device.crossed
        assert end.device == CUDA
        if drawn == "torch":
            torch.manual_seed(0)
            expected, _ = calls(diffusers, name, "cpu")
            with suspended(device):
                torch.testing.assert_close(end.clone(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [EULER, UNIPC, "DDIMScheduler"])
def test_diffusers_crosses_in_each_run(name: str, device: Device) -> None:
    """So the simulation would notice."""
    parent = None
    for _ in range(3):
        device.crossed.clear()
        _, parent = calls(diffusers, name, "cuda:0", parent)
        assert len(device.crossed) > 4


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_noise_without_a_begin_index(name: str, device: Device) -> None:
    """Each sample's own timestep is looked up on the device; one that is not in the schedule is NaN, or the last's."""
    twin, parent = make(twins, name), make(diffusers, name)
    method = method_of(type(twin))
    assert method is not None
    x, z = torch.linspace(-1.0, 1.0, 12).reshape(3, 4), torch.linspace(2.0, 1.0, 12).reshape(3, 4)
    parent.set_timesteps(5)
    for k in range(3):
        twin.set_timesteps(5, device="cuda:0")
        device.crossed.clear()
        pick = torch.tensor([3, 0, 4])
        there = twin.timesteps.index_select(0, device.put(pick.clone()))
        here = parent.timesteps[pick]
        given = [device.put(x.clone()), device.put(z.clone())]
        order = (lambda a, b, t: (a, t, b)) if method == "scale_noise" else (lambda a, b, t: (a, b, t))
        found = getattr(twin, method)(*order(*given, there))
        assert k == 0 or device.crossed == []
        expected = getattr(parent, method)(*order(x, z, here))
        lost = getattr(twin, method)(*order(*given, there * 0 - 7))
        with suspended(device):
            torch.testing.assert_close(found.clone(), expected, rtol=1e-5, atol=1e-6)
            if name.startswith("UniPC"):
                last = getattr(parent, method)(x, z, parent.timesteps[-1:].expand(3) * 0 - 7)
                torch.testing.assert_close(lost.clone(), last, rtol=1e-5, atol=1e-6)
            else:
                assert lost.isnan().all()
