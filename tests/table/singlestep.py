from table import Row

ROWS: list[Row] = []
