"""A sampler as data: stages of rows, checked, compiled to buffers and tables, registered by name, kept in files."""
