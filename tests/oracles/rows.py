"""A plan run by its definition: a dictionary of slots in float64, every row evaluated as it stands."""

import numpy as np


def run_plan(plan, denoise, x, noise=None, edit=None):
    """denoise(x, point) -> x0; noise(draw) -> z. Returns the final x and the list of (point, x) of the calls.

    denoise may return a pair, the second one the unguided x0. edit(k, slots, x0) -> slots after call k.
    """
    slots = {"x": np.asarray(x, dtype=np.float64)}
    calls = []

    def apply(row, values):
        return sum(c * values[source] for source, c in row.items())

    if plan.init is not None:
        z = noise(0) * plan.noise_scale if plan.init.row.get("z") else 0.0
        slots["x"] = apply(plan.init.row, {**slots, "z": z})
    for k, stage in enumerate(plan.stages):
        calls.append((stage.at, slots["x"]))
        found = denoise(slots["x"], stage.at)
        m, u = found if isinstance(found, tuple) else (found, found)
        values = {**slots, "m": m, "u": u, "z": 0.0}
        if any(row.get("z") for row in stage.rows.values()):
            values["z"] = noise(k + 1) * plan.noise_scale * stage.noise
        slots = {**slots, **{slot: apply(row, values) for slot, row in stage.rows.items()}}
        slots = slots if edit is None else edit(k, slots, m)
    return slots["x"], calls
