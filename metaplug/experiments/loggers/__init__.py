"""Where a run's figures go: into its own record, and wherever else one asks for.

`jsonl` is that record, which every run writes; `tensorboard`, `wandb` and `mlflow` are the loggers
that come with metaplug; `tables` is what they share; `asking` asks the loggers of
a run, and lets none of them end it.
"""
