"""What a device does with metaplug, in one page: `make gpu-report`, `metaplug gpu-report`.

`plan` says which parts there are, and of what units, by the names in `works`; `command` runs them
in turn within a budget, until one of the `signals`, by `running`, in processes of their own, whose
end (`processes`, `worker`) takes no other along.
`record` keeps what was measured, as JSON and as the page that `metaplug.report.gpu_page` writes.
`machine`, `cuda_tests`, `steps` and `training` do the work, each in such a process.

Everything else here needs Python alone, so that a package that is missing is said in the page.
`checkout` lets a checkout that was never installed find its own plugins.
"""
