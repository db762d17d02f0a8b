"""Tasks from tables, CSV and Parquet.

`tabular` is the source and `stream` its streams; `table` checks every cell of what `rows` reads.
"""
