"""Everything that people read: lines, tables, progress and pictures.

`console` has standard output for results, and standard error for all else. `terminal` has the
lines and the progress of a run, with its curve by `sparkline`; `study` the tables of a study, and
`study_progress` its progress; `tables` those of a configuration and of installed parts, which
`catalogue` describes. `figures` draws curves and `episodes` a task. `page` writes the HTML page of
a study or runs, `tuning` shows a search. `bench`, `scaling` and `soak` show what `metaplug bench`
measures, `gpu_page`, of `gpu_sections` and pieces of `markdown`, what `metaplug gpu-report` does.
"""
