"""The distillation runs behind `fewstep distill`: training loop, recipes and evaluation."""
