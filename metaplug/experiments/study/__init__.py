"""Studies: a grid of runs, each computed once, in a folder of its own.

`schema` is the file of a study, `cells` its grid, `identity` what names a cell's folder, `running`
computes cells, `results` reads them back as rows to compare, by `acceleration` among others.
"""
