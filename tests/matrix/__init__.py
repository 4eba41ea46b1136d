"""Every feature on every backend, under every kind of graph, in every dtype, with every solver: one table.

`axes` has the axes and the covering set, `features` one function per feature, `refusals` what is refused and why,
`page` makes docs/matrix.md. `python -m matrix` in tests/ runs every cell (`make matrix`).

A cell either works, and then equals an oracle (a plain loop over the plan's rows in float64, and plain formulas for
the rest), or is refused with an error that `refusals` states. To add a feature write one function in `features`; to
add a refusal, one line in `refusals`.
"""
