"""How far a plan fitted at one resolution carries to others, on digits of 8, 12 and 16 pixels.

    make resolution-report

The shipped digits network has a map of places of 8x8 and no other size. Here that map is resized with the image, and
the network is trained on from the shipped weights with the digits at three sizes (kept in build/resolutions/). Plans of
4 calls are fitted by `fewstep.tune` at each size and run at all of them. A cell is the error to the accurate ODE
solution of that size from the same latents, on seeds that no fit has seen. It writes docs/tuning/resolutions.json, and
the table in docs/plans-in-pipelines.md between its marks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

import fewstep as fs
from fewstep.bindings.unet import NO_CLASS, UNet, digits_model
from fewstep.digits_data import load_split
from fewstep.solvers.files import write_whole
from reports.pipeline_report import by_hand, calls_for, cell, row, write
from reports.train_digits import noised, stratified

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "tuning" / "resolutions.json"
KEPT = ROOT / "build" / "resolutions"
MARKS = "<!-- resolutions -->", "<!-- /resolutions -->"

SIZES = (8, 12, 16)
UPDATES, BATCH, RATE, MEMORY = 3000, 32, 5e-4, 0.998
NFE, CALLS = 4, (4, 6, 8, 10, 12)
SEEDS, TEST, REFERENCE = 32, 80, 64  # of a fit, of the test, and calls of the ODE solutions


class AnySize(torch.nn.Module):
    """The digits network for images whose sides are multiples of 4: its map of places is resized to them."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet()

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        place = interpolate(self.unet.place, size=x.shape[-2:], mode="bilinear", align_corners=False)
        out: Tensor = torch.func.functional_call(self.unet, {"place": place}, (x, t, label))
        return out


def trained() -> AnySize:
    """The network, from build/resolutions/ if it is there."""
    net, path = AnySize(), KEPT / "network.safetensors"
    if path.exists():
        net.load_state_dict(safetensors.torch.load_file(path))
        return net.eval().requires_grad_(False)
    net.unet.load_state_dict(digits_model().state_dict())
    mean = AnySize().requires_grad_(False)
    mean.load_state_dict(net.state_dict())
    data = load_split()[0]
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01)
    for update in tqdm(range(UPDATES), desc="training"):
        size = SIZES[update % len(SIZES)]
        pick = torch.randint(len(data.x), (BATCH,), generator=generator)
        label = data.label[pick].masked_fill(torch.rand(BATCH, generator=generator) < 0.12, NO_CLASS)
        images = interpolate(data.x[pick], size=(size, size), mode="bilinear", align_corners=False)
        t = stratified(BATCH, 0.0, fs.VP.linear().t_first, generator)
        x, v = noised(images, t, generator)
        optimiser.param_groups[0]["lr"] = RATE * 0.5 * (1.0 + math.cos(math.pi * update / UPDATES))
        optimiser.zero_grad()
        loss = (net(x, t, label) - v).square().mean()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), 1.0 - min(MEMORY, update / 10))
    KEPT.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda to: safetensors.torch.save_file(mean.state_dict(), to))
    return mean.eval()


def fitted(denoiser: Any, size: int) -> fs.Plan:
    path = KEPT / f"plan-{size}.json"
    if not path.exists():
        cond = {"label": torch.arange(10)}
        fs.save_plan(fs.tune(denoiser, NFE, shape=(1, size, size), cond=cond, seeds=SEEDS, cache=KEPT), path)
    return fs.load_plan(path, denoiser)


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    denoiser = fs.Denoiser(trained(), fs.VP.linear(), "v")
    labels = torch.arange(TEST) % 10
    process = denoiser.process
    karras = {n: fs.plan("dpmpp_2m", fs.grid(process, n, "karras")) for n in CALLS}
    plans = {size: fitted(denoiser, size) for size in SIZES}
    made: dict[str, Any] = {"nfe": NFE, "test": TEST, "carry": {}, "hand": {}, "karras": {}}
    for size in SIZES:
        z = torch.randn(TEST, 1, size, size, generator=torch.Generator().manual_seed(1234))

        def run(plan: fs.Plan, z: Tensor = z) -> Tensor:
            found: Tensor = fs.Sampler(denoiser, plan, tuple(z.shape))(z, cond={"label": labels})
            return found

        end = run(fs.plan("unipc", fs.grid(process, REFERENCE, "logsnr"), order=3))

        def errors(plan: fs.Plan, run: Any = run, end: Tensor = end) -> dict[str, float]:
            squares = (run(plan) - end).square().flatten(1).mean(1).double().numpy()
            return {"rmse": float(np.sqrt(squares.mean())), "median": float(np.sqrt(np.median(squares)))}

        for own, plan in plans.items():
            made["carry"].setdefault(str(own), {})[str(size)] = errors(plan)
        made["hand"][str(size)] = errors(by_hand(plans[size]))
        made["karras"][str(size)] = {str(n): errors(plan) for n, plan in karras.items()}
    return made


def table(made: dict[str, Any]) -> str:
    """The table of the page."""
    sizes = list(made["hand"])

    def carried(size: str, found: dict[str, float]) -> str:
        return f"{cell(found)} ({calls_for(made['karras'][size], found)})"

    lines = [row("fitted at", [f"run at {s}x{s}" for s in sizes]), "|---" * (1 + len(sizes)) + "|"]
    for own, found in made["carry"].items():
        lines.append(row(f"{own}x{own}", [carried(s, found[s]) for s in sizes]))
    lines.append(row(f"best hand-made of each fit, {NFE} calls", [cell(made["hand"][s]) for s in sizes]))
    for n in (NFE, 12):
        lines.append(row(f"2M Karras, {n} calls", [cell(made["karras"][s][str(n)]) for s in sizes]))
    return "\n".join(lines)


def main() -> None:
    made = measure()
    write(made, RESULTS, table(made), MARKS)


if __name__ == "__main__":
    main()
