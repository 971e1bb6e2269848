"""One module per claim that whole runs show: each runs by itself, saves JSON and has a section in the report."""
