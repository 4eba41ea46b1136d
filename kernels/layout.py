"""The coefficient layout that all backends share.

One stage's table `w` has shape (1 or B, rows, COLUMNS): a row for each output, a column for each source.
With batch size 1 the row is shared by all samples.
"""

from __future__ import annotations

SLOTS = 8  # columns 0 .. 7: x, then the other slots that the stage reads
RAWS = 3  # columns 8 .. 10: the network's raw outputs, when the prediction is folded into the rows
RAW = SLOTS
PREDICTION = SLOTS + RAWS  # column 11: m, the x0 prediction, when it is computed (clip, thresholding)
NOISE = PREDICTION + 1  # column 12: z
COLUMNS = NOISE + 1
OUTPUTS = 5  # rows: the new x first
INPUTS = 3  # copies of the next model input, one for each half (or third) of a guided batch
