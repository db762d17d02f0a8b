"""The contract between metaplug and the parts that others write.

* `hookspecs`: every hook, its kind and what it may touch; `values`, `task_batch`: what passes.
* `inputs`: one tensor or several, by name or place; `task_sizes`, `task_groups`: tasks that differ
  in size, and those of one size together; `task_checks`: what makes a batch, and what does not.
* `plugin`, `function_plugins`: a plugin and its Config; a module or function as one.
* `chain`: the plugins of one run, folded and asked; `schedule`, `naming`: epochs and names.
* `plugin_checks`, `return_checks`: what a class must keep to, and what a hook may return.
* `registry`, `presets`: what is installed; algorithms as lists of plugins.
* `logger`: what shows a run's figures elsewhere.
"""
