"""torchmeta 1.8.0: its data sets and toys as tasks, beside today's torch.

`source` is the task source, `data` finds, verifies and builds the archives, `toys` computes the
toys, and `compatibility` makes torchmeta import and run.
"""
