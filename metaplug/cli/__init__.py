"""The `metaplug` command line: one module per command.

`train`, `compare`, `evaluate`, `listing` (explain, plugins and tasks), `new_plugin` and `bench`
read their options and print their answer. `main` runs them and turns every failure into one line
and an exit status. `options` holds the options that several commands take, `stopping` handles
Ctrl-C and SIGTERM, `ranks` handles torchrun. Nothing here imports torch at the top, since `--help`
must be quick.
"""
