"""What a step adds to a real network: the loop's latency less the network's, by loop.

The last file of the bench, because it changes how the process keeps memory.
"""

import pytest

from fewstep.cli import latency

SHAPES = ("1x7x16", "1x4x64x64")
NETWORKS = {0.1: 100, 1.0: 60, 10.0: 30}  # milliseconds: rounds

# By side: the most microseconds per step, and the least ratio of diffusers' time. Of fs.sample, ten steps in all.
GOALS = {"sampler": (15.0, 10.0), "twin": (60.0, 4.0), "sample": (30.0, None)}


@pytest.mark.parametrize("milliseconds", NETWORKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", latency.SOLVERS)
def test_a_step_between_the_calls_of_a_network(solver, shape, milliseconds, benchmark, report, one_thread):
    pytest.importorskip("diffusers")
    ((_, case),) = latency.cases([shape], [solver], [milliseconds])
    record = latency.measure(case, NETWORKS[milliseconds], milliseconds)
    assert record["failed"] is None
    theirs = record["diffusers_us"]
    for side, (most, least) in {"operator": (None, None), **GOALS}.items():
        name, ours = f"{side} {solver} {shape} beside a network of {milliseconds:g} ms", record[f"{side}_us"]
        if most is not None:
            report(f"latency {name}", ours, most, ours, ("<=", most), "us/step")
        # Beside a long network a loop may be lost in the spread of its windows.
        ratio = theirs / ours if record["spread"][f"{side}_us"][0] > 0.0 else None
        report(f"latency ratio {name}", ours, theirs, ratio, least and (">=", least), "us/step")
    benchmark.pedantic(case.sides()["sampler"].run, rounds=3)
