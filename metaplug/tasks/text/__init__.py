"""Tasks from texts with labels.

`source` is the source, `episodes` its streams; `table` checks every row of what `json_lines` and
the reader of tables read, and `tokens` turns texts into token ids, which are kept in a cache.
"""
