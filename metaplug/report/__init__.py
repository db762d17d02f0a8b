"""Everything that people read: lines, tables, progress and pictures.

`console` has standard output for results, and standard error for all else. `terminal` has the
lines and the progress of a run, with its curve by `sparkline`, `comparison` the table of a
comparison, `tables` those of a configuration and of installed parts, which `catalogue` describes.
`figures` draws curves and `episodes` a task. `bench`, `scaling` and `soak` show what `metaplug
bench` measures. `page` writes the HTML page of a study or runs.
"""
