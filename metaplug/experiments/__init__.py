"""Experiments as data: a configuration becomes a run in a folder, or part of a comparison.

`configuration` is the schema, and says where each value came from; `build` makes the learner and
the tasks; `comparison` trains variants at an equal budget; `json_values` is what they leave in
files; `runs` trains in a folder, resumes, reads back and repeats; `export` writes an adapted model
as files, by `programs` and for the examples of `support_sets`.
"""
