"""The layout of coefficient tables, shared by all backends.

A stage's table w has shape (1 or B, rows, COLUMNS): a row per output, a column per source. With a first axis of 1 all
samples share it. A table has at most 65 numbers per sample, so its traffic does not count.
"""

from __future__ import annotations

SLOTS = 8  # columns 0 .. 7: x, then the other slots that the stage reads
RAWS = 3  # columns 8 .. 10: the network's raw outputs, where the prediction is folded into the rows
RAW = SLOTS
PREDICTION = SLOTS + RAWS  # column 11: m, the x0 prediction, where it is computed (clip, thresholding)
NOISE = PREDICTION + 1  # column 12: z
COLUMNS = NOISE + 1
OUTPUTS = 5  # most rows: the new x first
INPUTS = 3  # most copies of the next model input, one per branch of a guided batch

# A blend: numbers, one row for all samples or one per sample, from which a reduction makes p (see `naive.blend`). Five
# groups of four coefficients over [x, raw_1, raw_2, raw_3], then two numbers.
MIX_A, MIX_B, FIXED, SCALED, PROJECTED = 0, 4, 8, 12, 16
PHI, RADIUS = 20, 21
BLEND = 24  # columns; the last two are not used
