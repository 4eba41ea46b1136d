"""The distilled students of the figures: shipped, or trained anew by the distillation runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fewstep.solvers.files import write_whole
from fewstep.solvers.options import needs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fewstep.distill_runs.ring_teachers import Consistency, RingProgressive

NAME = "ring_students"  # of the weights and of what made them
WIDTH = 48  # of the networks' layers; the distillation's own is 128
COMMANDS = tuple(
    f"fewstep distill {method} --option width={WIDTH} --out {method}" for method in ("progressive", "consistency")
)


class Students(NamedTuple):
    """Trained recipes. made: by method what trained it, for the captions."""

    progressive: RingProgressive
    consistency: Consistency
    made: Mapping[str, str]


def recipes(steps: int | None = None) -> tuple[RingProgressive, Consistency]:
    """Untrained recipes. steps: of each run; by default the methods' own."""
    needs("the gallery", "torch", "safetensors", extra="torch")
    from fewstep.distill_runs.methods import make_recipe
    from fewstep.distill_runs.ring_teachers import Consistency, RingProgressive

    made = [make_recipe(m, "ring", steps, options={"width": WIDTH}) for m in ("progressive", "consistency")]
    progressive, consistency = made
    assert isinstance(progressive, RingProgressive)
    assert isinstance(consistency, Consistency)
    return progressive, consistency


def load() -> Students:
    """The shipped students."""
    import safetensors.torch

    progressive, consistency = recipes()
    weights = files("fewstep.weights")
    tensors = safetensors.torch.load((weights / f"{NAME}.safetensors").read_bytes())
    for name, module in _modules(progressive, consistency).items():
        prefix = f"{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return Students(progressive, consistency, _made(json.loads((weights / f"{NAME}.json").read_text("utf-8"))))


def train(
    out: Path, advance: Callable[[str, int, int], None] = lambda name, done, total: None, steps: int | None = None
) -> Students:
    """Train both students; write <out>/ring_students.safetensors and .json, in the form of the shipped ones.

    advance  called with the method, the steps done and their number
    """
    import safetensors.torch
    import torch

    from fewstep.distill_runs import training
    from fewstep.distill_runs.evaluate import evaluate

    both = recipes(steps)
    record: dict[str, object] = {"commands": COMMANDS, "width": WIDTH}
    for recipe in both:
        name, total = recipe.settings.method, recipe.settings.steps

        def watch(done: int, values: Mapping[str, float], name: str = name, total: int = total) -> None:
            advance(name, done, total)

        training.train(recipe, watch=watch)
        record[name] = {**vars(recipe.settings), "seconds": round(recipe.seconds, 1), **evaluate(recipe).as_json()}
    record["versions"] = {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__}
    tensors: dict[str, Tensor] = {}
    for name, module in _modules(*both).items():
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in module.state_dict().items()}
    data = safetensors.torch.save(tensors)
    write_whole(out / f"{NAME}.safetensors", lambda to: to.write_bytes(data))
    text = json.dumps(record, indent=2) + "\n"
    write_whole(out / f"{NAME}.json", lambda to: to.write_text(text, encoding="utf-8"))
    return Students(*both, _made(json.loads(text)))


def _modules(progressive: RingProgressive, consistency: Consistency) -> dict[str, torch.nn.Module]:
    """The networks that are sampled from."""
    rounds = [f"student{grid.steps}" for grid in progressive.grids[1:]]
    return {name: progressive.modules[name] for name in rounds} | {"consistency": consistency.modules["average"]}


def _made(record: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    network = f"3 x {WIDTH} perceptron trained by `fewstep distill"
    return {
        method: f"a {network} {method}` in {record[method]['steps']} steps of {record[method]['batch']} samples"
        for method in ("progressive", "consistency")
    }
