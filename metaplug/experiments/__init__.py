"""Experiments as data: a configuration becomes a run in a folder, or one of a study.

`configuration` is the schema; `resolving` makes one of layers, and says where each value came from;
`build` makes the learner and the tasks; `json_values` is what they leave in files. `runs` trains in
a folder, resumes, reads back and repeats; `study` computes a grid of runs and compares them, by
`parallel` several at once; `tuning` searches fields; `loggers` show a run elsewhere; `export`
writes an adapted model as a program.
"""
