"""Butcher tableaux of explicit Runge-Kutta methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

# Sums that can be open at once: the fused kernel writes five slots, one of which may be the x0 prediction.
_OPEN = 4

# (a, b) of a Butcher tableau.
Weights = tuple[Sequence[Sequence[float]], Sequence[float]]


@dataclass(frozen=True)
class Tableau:
    """y_i = y + h sum_j a_ij d_j, y' = y + h sum_j b_j d_j (Butcher).

    Raises ValueError unless row i of `a` has i finite numbers and b has one for each row, with sum 1.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.a or [*map(len, self.a)] != [*range(len(self.a))]:
            raise ValueError(
                f"tableau: row i of a must hold i numbers (an explicit method), got lengths {[*map(len, self.a)]}"
            )
        if not all(math.isfinite(v) for row in (*self.a, self.b) for v in row):
            raise ValueError("tableau: a and b must be finite, got NaN or inf")
        if len(self.b) != len(self.a) or abs(sum(self.b) - 1.0) > 1e-12:
            raise ValueError(f"tableau: b must hold {len(self.a)} numbers that sum to 1, got {self.b!r}")

    @classmethod
    def of(cls, pair: Weights) -> Tableau:
        """From a pair (a, b) of nested sequences of numbers."""
        try:
            a, b = pair
            return cls(tuple(tuple(map(float, row)) for row in a), tuple(map(float, b)))
        except TypeError as error:
            raise ValueError(
                f"tableau must be a name or a pair (a, b) of sequences of numbers, got {pair!r}"
            ) from error

    @cached_property
    def c(self) -> tuple[float, ...]:
        return tuple(sum(row) for row in self.a)

    @cached_property
    def partial(self) -> bool:
        """Whether all sums that are open at once have a slot, so that no slope need be kept."""
        sums: Sequence[Sequence[float]] = [*self.a, self.b]
        begun = [sum(any(later[: i + 1]) for later in sums[i + 2 :]) for i in range(len(self.a))]
        waiting = not all(later[0] for later in sums[2:])  # a later sum still needs y
        return max(begun) + 1 + waiting <= _OPEN


def second_order(alpha: float) -> Tableau:
    """The two-stage family (Karras et al. 2022, eq. 17): midpoint 1/2, Ralston 2/3, Heun 1."""
    return Tableau(((), (alpha,)), (1.0 - 0.5 / alpha, 0.5 / alpha))


EULER = Tableau(((),), (1.0,))
HEUN = second_order(1.0)
RK4 = Tableau(((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
# The third-order method of the pair of Bogacki & Shampine (1989).
BOGACKI_SHAMPINE = Tableau(((), (0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9))
# The fifth-order method of the pair of Dormand & Prince (1980); its seventh stage has no weight in b.
DORMAND_PRINCE = Tableau(
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)

TABLEAUX: Mapping[str, Tableau] = {
    "euler": EULER,
    "midpoint": second_order(0.5),
    "ralston": second_order(2 / 3),
    "heun": HEUN,
    "bogacki_shampine": BOGACKI_SHAMPINE,
    "rk4": RK4,
    "rk4_38": Tableau(((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
    "dormand_prince": DORMAND_PRINCE,
}
