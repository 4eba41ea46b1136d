"""What the bindings use of diffusers' schedulers, for the type checker: diffusers itself types little of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

Timestep: TypeAlias = "int | float | Tensor"

if TYPE_CHECKING:
    from collections.abc import Callable
    from fractions import Fraction

    from torch import Tensor

    class Scheduler:
        corrected: bool
        noise: str
        config: Any  # a FrozenDict, whose entries are attributes too
        timesteps: Tensor
        alphas_cumprod: Tensor
        sigmas: Tensor
        sigma_min: float
        sigma_max: float
        num_inference_steps: int | Fraction
        step_index: int | None
        derivatives: list[Tensor]
        earlier: Tensor | None
        ets: list[Tensor]
        lower_order_nums: int
        noise_sampler: Callable[..., Tensor] | None
        noise_sampler_seed: int | list[int] | None
        _shared: Any  # of a twin
        _step_index: int
        _internal_dict: dict[str, Any]

        from_config: Callable[..., Scheduler]
        scale_model_input: Callable[..., Tensor]
        precondition_noise: Callable[[Tensor], Tensor]
        _init_step_index: Callable[[Timestep], None]
        _sigma_to_alpha_sigma_t: Callable[[Tensor], tuple[Tensor, Tensor]]
        _threshold_sample: Callable[[Tensor], Tensor]

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def set_timesteps(self, *args: Any, **kwargs: Any) -> None: ...

        def step(self, *args: Any, **kwargs: Any) -> object: ...

        def _get_variance(self, *args: Any, **kwargs: Any) -> Tensor:
            raise NotImplementedError
else:
    Scheduler = object

NOISES = ("torch", "fewstep")


def check_noise(noise: str) -> str:
    """`noise` if it is one of `NOISES`. Raises ValueError for anything else."""
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(map(repr, NOISES))}, got {noise!r}")
    return noise
