"""Attempts of an embedded pair for a batch of samples: step-size control, and the coefficients of every stage.

Plain functions on scalars, a loop over samples outside. `numba_attempts` compiles this source; until then Python runs
it, with the same bits: both call the C library's exp, expm1, atan and pow. They read and write a few hundred bytes per
sample.

One column of `state` holds what is known of a sample, in the rows named below. START describes the point where the step
begins and END the one where it ends, with the rows of a point from LAM to FM.
"""

from __future__ import annotations

import math

import numpy as np

from fewstep.kernels import layout

# The rows of a point: lambda = log(alpha / sigma); the process's t, alpha, sigma; the network's time and c_in; (a, b)
# of the x0 prediction a x + b raw; `own` and `other` of the form, and F = fx x + fm m.
LAM, T, ALPHA, SIGMA, TIME, C_IN, A, B, OWN, OTHER, FX, FM = range(12)
POINT = 12
# The rows of `state`: known is 1 where F_1 has been computed at the start, taken where the last attempt was accepted,
# final where the step ends at the last point; h is the size of the next step, LAST and BEFORE are the inverse errors of
# the last two accepted steps; step is the length of this one in the form's time variable.
SAMPLE, NFE, ACCEPTED, REJECTED, KNOWN, TAKEN, FINAL, H, LAST, BEFORE, STEP, START = range(12)
END = START + POINT
STATE = END + POINT
# `numbers` of control: the exponents b1 .. b3, accept_safety, whether the last F is the next first, calls per attempt,
# the largest numbers of steps and of calls; and the tolerances.
B1, B2, B3, SAFETY, KEPT, CALLS, MOST_STEPS, MOST_CALLS, RTOL, ATOL = range(10)
# The memory of `finish`: the addresses of the error, of the higher-order and the lower-order result, of the sample and
# the lower-order result of the last accepted step, of the first and the last F (0 if that is not kept); then the number
# of samples, and of elements of each.
ERROR, HIGH, LOW, X, BEFORE_LOW, FIRST_F, LAST_F, SAMPLES, ELEMENTS = range(9)
FINISH = 9
# What `control` reports: the first sample with an error and its kind, and how many steps were accepted and finished.
PROBLEM, AT, TAKEN_COUNT, FINAL_COUNT = range(4)
NOT_FINITE, TOO_MANY_STEPS, TOO_MANY_CALLS = 1, 2, 3

_COLUMNS, _RAW, _RAWS, _PREDICTION = layout.COLUMNS, layout.RAW, layout.RAWS, layout.PREDICTION


def moment(order: int, z: float) -> float:
    """M_order(z) = int_0^1 z e^(-z (1 - u)) u^order du for finite z, without cancellation at small z."""
    if order == 0 or abs(z) >= 1.0:
        found = -math.expm1(-z)
        for n in range(1, order + 1):
            found = 1.0 - n * found / z
        return found
    term = z / (order + 1)
    total, k = 0.0, 0
    while abs(term) > 1e-18 * abs(z):
        total, k = total + term, k + 1
        term *= -z / (order + k + 1)
    return total


def propose(
    state: np.ndarray, c: np.ndarray, end: float, end_ratio: float, ratios: np.ndarray, points: np.ndarray
) -> None:
    """The next step of each sample: h in lambda, cut at the last point.

    c       (K,) the nodes of the targets in the step
    end     lambda of the last point; a remainder below 1e-5 is merged into the last step (k-diffusion)
    ratios  (K, n), receives sigma / alpha at the nodes
    points  (POINT, K, n), receives lambda at the nodes
    """
    for i in range(ratios.shape[1]):
        lam, h = state[START + LAM, i], state[H, i]
        final = lam + h > end - 1e-5
        h = end - lam if final else h
        state[FINAL, i] = 1.0 if final else 0.0
        state[STEP, i] = h
        state[END + LAM, i] = end if final else lam + h
        for k in range(len(c)):
            points[LAM, k, i] = lam + c[k] * h
            ratios[k, i] = end_ratio if final and c[k] == 1.0 else math.exp(-points[LAM, k, i])


def control(state: np.ndarray, norms: np.ndarray, numbers: np.ndarray, report: np.ndarray) -> None:
    """Accept or reject the attempt of each sample, and choose the size of its next step.

    PID control as in k-diffusion: h <- h limit(e_n^-b1 e_(n-1)^-b2 e_(n-2)^-b3), limit(v) = 1 + atan(v - 1). The step
    is accepted if the factor is at least `accept_safety`. e_n is the error of this step, e_(n-1) and e_(n-2) are those
    of the last two accepted steps.

    norms   (n,) the errors in units of the tolerance
    report  (4,) int64, see above; the attempts behind a problem are not judged
    """
    report[:] = 0
    for i in range(len(norms)):
        report[AT] = i
        # A call at the start is shared by the attempts from there.
        state[NFE, i] += numbers[CALLS] - 1.0 + (1.0 - state[KNOWN, i])
        if not math.isfinite(norms[i]):
            report[PROBLEM] = NOT_FINITE
            return
        # No error is taken to be larger than 1e12 tolerances: a power of it must not overflow.
        inverse = max(1.0 / (float(norms[i]) + 1e-8), 1e-12)
        last = float(state[LAST, i]) if state[LAST, i] > 0.0 else inverse
        before = float(state[BEFORE, i]) if state[LAST, i] > 0.0 else inverse
        raw = inverse ** float(numbers[B1]) * last ** float(numbers[B2]) * before ** float(numbers[B3])
        factor = 1.0 + math.atan(raw - 1.0)
        taken = factor >= numbers[SAFETY]
        # The last step is cut at the end of the grid: h itself was not tried.
        tried = state[END + LAM, i] - state[START + LAM, i]
        state[H, i] = (state[H, i] if taken else tried) * factor
        state[LAST, i], state[BEFORE, i] = (inverse, last) if taken else (last, before)
        state[TAKEN, i] = 1.0 if taken else 0.0
        state[ACCEPTED if taken else REJECTED, i] += 1.0
        state[KNOWN, i] = numbers[KEPT] if taken else 1.0
        over = taken and state[FINAL, i] > 0.0
        if not over and state[ACCEPTED, i] + state[REJECTED, i] >= numbers[MOST_STEPS]:
            report[PROBLEM] = TOO_MANY_STEPS
            return
        if not over and state[NFE, i] >= numbers[MOST_CALLS]:
            report[PROBLEM] = TOO_MANY_CALLS
            return
        if taken:
            report[TAKEN_COUNT] += 1
            report[FINAL_COUNT] += 1 if over else 0
            for j in range(POINT):
                state[START + j, i] = state[END + j, i]


def tables(
    state: np.ndarray,
    points: np.ndarray,
    bases: np.ndarray,
    weights: np.ndarray,
    error: np.ndarray,
    sign: float,
    shares: np.ndarray,
    folded: bool,
    kept: bool,
    noise_form: bool,
    out: np.ndarray,
    p: np.ndarray,
    times: np.ndarray,
) -> None:
    """The coefficients of every stage of an attempt, for each sample.

    points   (POINT, K, n), at the nodes of the K targets; the last one becomes the state's END, except its lambda
    bases    (q, 2), the functions that weights are made of: (k, c) is M_k(c z), z = sign step; (-1, c) is the step
    weights  (K, J, q), of F_1 .. F_J in each target: x_k = own_k / own x + other_k sum_j weights_kj F_j
    error    (J, q), of F_1 .. F_J in the lower-order minus the higher-order result
    shares   (J, n, raws), the weights of the network's outputs in each call
    folded   whether m is multiplied out
    kept     whether the last F has a row of its own
    noise_form  whether the form is `exponential_rk.EPS`, whose rows of the points are written here
    out      flat, of the state's dtype, with room for p.shape[1] samples: the c_in (J, n) and the times (J, n) of the
             calls, then the table (n, rows, COLUMNS) of each stage. Columns that no stage uses are left alone
    p        (J, n, 4), receives the prediction of each call
    times    (J, n), receives the network's time of each call
    """
    calls, _, raws = shares.shape
    targets, basis = weights.shape[0], len(bases)
    width = p.shape[1]  # samples that the tables have room for
    n = points.shape[2]
    mu, f = np.empty(basis), np.empty(calls)
    for i in range(n):
        if noise_form:
            for k in range(targets):
                alpha, sigma = points[ALPHA, k, i], points[SIGMA, k, i]
                points[OWN, k, i], points[OTHER, k, i] = alpha, sigma
                points[FX, k, i], points[FM, k, i] = 1.0 / sigma, -alpha / sigma
        h = state[STEP, i]
        for m in range(basis):
            order = int(bases[m, 0])
            mu[m] = h if order < 0 else moment(order, sign * bases[m, 1] * h)
        for j in range(POINT):
            if j != LAM:
                state[END + j, i] = points[j, targets - 1, i]
        at = 0  # of this stage's table
        for stage in range(calls + 1):  # F_1, then the first target, then the other calls
            call = max(stage - 1, 0)
            start = call == 0
            fx = state[START + FX, i] if start else points[FX, call - 1, i]
            fm = state[START + FM, i] if start else points[FM, call - 1, i]
            if stage != 1:
                a = state[START + A, i] if start else points[A, call - 1, i]
                b = state[START + B, i] if start else points[B, call - 1, i]
                p[call, i, 0] = a
                for k in range(_RAWS):
                    p[call, i, 1 + k] = b * shares[call, i, k] if k < raws else 0.0
                times[call, i] = state[START + TIME, i] if start else points[TIME, call - 1, i]
                out[call * width + i] = state[START + C_IN, i] if start else points[C_IN, call - 1, i]
                out[(calls + call) * width + i] = times[call, i]
            last = call + 1 == calls
            reaches = 0 if stage == 0 else (1 if call < targets else 0)
            own_row = 1 if stage == 0 or (stage > 1 and (not last or kept)) else 0
            rows = reaches + own_row + (1 if last and stage > 1 else 0)
            for r in range(rows):
                row = 2 * calls * width + (at * width + i * rows + r) * _COLUMNS
                x = 0.0
                if r < reaches:
                    x = points[OWN, call, i] / state[START + OWN, i]
                    for j in range(call + 1):
                        total = 0.0
                        for m in range(basis):
                            total += weights[call, j, m] * mu[m]
                        f[j] = total * points[OTHER, call, i]
                elif r < reaches + own_row:
                    for j in range(call):
                        f[j] = 0.0
                    f[call] = 1.0
                else:
                    for j in range(calls):
                        total = 0.0
                        for m in range(basis):
                            total += error[j, m] * mu[m]
                        f[j] = total * points[OTHER, targets - 1, i]
                out[row + 1] = x
                for j in range(call if stage != 1 else 1):
                    out[row + 2 + j] = f[j]
                if stage != 1:  # F of this call from its input and its outputs
                    g = f[call] * fm
                    if folded:
                        out[row] = f[call] * fx + g * p[call, i, 0]
                        for k in range(_RAWS):
                            out[row + _RAW + k] = g * p[call, i, 1 + k]
                    else:
                        out[row] = f[call] * fx
                        out[row + _PREDICTION] = g
            at += rows
