"""GRPO on a toy problem: a flow model of a ring of points learns to follow prompts, from a reward alone.

    python examples/grpo/grpo.py --plot grpo.png

A prompt is a point of the ring. By flow matching the network first learns to draw the whole ring, whatever the prompt:
the reference policy. Then each iteration draws a group of samples for each of a few prompts with `flow_sde`, whose
steps are Gaussian draws. A sample's advantage is its reward relative to its group. `fewstep.log_prob` gives the ratio
of the new policy to the one that drew, which is clipped as in PPO, and the KL to the reference.
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import NamedTuple

import torch

import fewstep as fs

PROCESS = fs.Flow()
PLAN = fs.plan("flow_sde", fs.grid(PROCESS, 8), eta=0.7, window=(0, 7))  # the last step draws nothing


class Velocity(torch.nn.Module):
    """A flow model in the plane: x, t and a prompt to the velocity."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, 2),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        angle = 0.5 * math.pi * t[:, None]
        velocity: torch.Tensor = self.layers(torch.cat([x, angle.cos(), angle.sin(), prompt], 1))
        return velocity


class Learned(NamedTuple):
    """The result of `learn`.

    rewards, kls    the means of each iteration; KL to the reference, summed over the steps
    first_ratios    (B, noisy steps) at the first update, when the policy is still the one that drew
    prompts         (n, 2)
    before, after   (n, 2) samples of the reference and of the policy for these prompts
    """

    rewards: list[float]
    kls: list[float]
    first_ratios: torch.Tensor
    prompts: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def ring(n: int, generator: torch.Generator) -> torch.Tensor:
    """(n, 2) points of the unit circle."""
    angle = 2.0 * math.pi * torch.rand(n, generator=generator)
    return torch.stack([angle.cos(), angle.sin()], 1)


def reward(x: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """(n,) how near samples are to their prompts."""
    return -(x - prompts).square().sum(1)


def pretrained(updates: int, generator: torch.Generator) -> Velocity:
    """A network that draws the ring: flow matching, x = (1 - t) data + t noise, whose velocity is noise - data."""
    network = Velocity()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(updates):
        data = ring(256, generator) + 0.05 * torch.randn(256, 2, generator=generator)
        noise, t = torch.randn(256, 2, generator=generator), torch.rand(256, generator=generator)
        x = (1.0 - t[:, None]) * data + t[:, None] * noise
        loss = (network(x, t, ring(256, generator)) - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def learn(
    iterations: int = 100,
    groups: int = 16,
    members: int = 16,
    epochs: int = 2,
    clip: float = 0.2,
    beta: float = 0.01,
    pretraining: int = 1000,
    seed: int = 0,
    report: bool = False,
) -> Learned:
    """Train a policy.

    groups, members  prompts of an iteration, and samples for each
    epochs           updates on the samples of an iteration
    clip             a ratio beyond 1 +- clip gives no further gradient
    beta             the weight of the KL to the reference
    pretraining      updates of flow matching before
    report           print every tenth iteration
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = pretrained(pretraining, generator)
    reference = fs.Denoiser(copy.deepcopy(network), PROCESS, predicts="flow")
    policy = fs.Denoiser(network, PROCESS, predicts="flow")
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    ratios: list[torch.Tensor] = []
    rewards: list[float] = []
    kls: list[float] = []
    for iteration in range(iterations):
        prompts = ring(groups, generator).repeat_interleave(members, 0)
        cond = {"prompt": prompts}
        path = fs.rollout(policy, PLAN, prompts.shape, seed=iteration, cond=cond)
        score = reward(path.x, prompts)
        grouped = score.reshape(groups, members)
        centred = grouped - grouped.mean(1, keepdim=True)
        advantage = (centred / (grouped.std(1, keepdim=True) + 1e-6)).reshape(-1, 1)
        # Steps that draw nothing have no ratio.
        noisy, old = torch.from_numpy(path.noisy), torch.from_numpy(path.log_prob)
        with torch.no_grad():
            anchor = fs.log_prob(reference, PLAN, path.states, cond=cond)
        for _ in range(epochs):
            now = fs.log_prob(policy, PLAN, path.states, cond=cond)
            ratio, kl = (now.log_prob - old).exp()[:, noisy], now.kl(anchor)[:, noisy]
            ratios.append(ratio.detach())
            gain = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
            loss = (beta * kl - gain).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rewards.append(float(score.mean()))
        kls.append(float(kl.detach().sum(1).mean()))
        if report and (iteration % 10 == 0 or iteration == iterations - 1):
            print(f"iteration {iteration:3d}  reward {rewards[-1]:7.3f}  KL {kls[-1]:7.3f}", flush=True)
    prompts = ring(400, generator)
    before, after = (
        fs.sample(one, shape=prompts.shape, solver="dpmpp_2m", steps=12, seed=seed, cond={"prompt": prompts})
        for one in (reference, policy)
    )
    return Learned(rewards, kls, ratios[0], prompts, before, after)


def draw(found: Learned, path: str) -> None:
    """Save a plot: the reward, and samples coloured by their prompts before and after."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curve, *panels) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    curve.plot(found.rewards)
    curve.set(xlabel="iteration", ylabel="mean reward", title="Reward")
    colours = torch.atan2(found.prompts[:, 1], found.prompts[:, 0])
    for panel, title, x in zip(panels, ("Before", "After"), (found.before, found.after), strict=True):
        panel.scatter(x[:, 0], x[:, 1], c=colours, cmap="hsv", s=8)
        panel.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal", title=f"{title}, coloured by prompt")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="save a plot")
    given = parser.parse_args()
    torch.set_num_threads(1)  # more threads cost a small network more than they give
    found = learn(given.iterations, seed=given.seed, report=True)
    before, after = (float(reward(x, found.prompts).mean()) for x in (found.before, found.after))
    print(f"without noise: reward {before:.3f} before, {after:.3f} after")
    if given.plot:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
