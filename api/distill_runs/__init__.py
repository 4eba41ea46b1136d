"""The distillation runs behind `fewstep distill`: training loop, recipes and evaluation."""

from fewstep.solvers.options import needs

needs("distillation", "torch", "safetensors", extra="torch")
