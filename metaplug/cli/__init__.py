"""The `metaplug` command line: every command's options and answer.

`train`, `compare`, `evaluate`, `export`, `new_plugin`, `conformance` (test-plugin), `hooks`,
`bench`, `gpu_report` and `listing` (explain, plugins and tasks) are the commands. `main` runs them
and turns every failure into one line and an exit status. `options` are those that several commands
take, `stopping` handles Ctrl-C and SIGTERM, `ranks` torchrun. No module imports torch at its top,
since `--help` must be quick.
"""
