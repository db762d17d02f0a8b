"""Tasks that a user has: a list, a data set, an iterable or a generator of them, or a function.

`items` reads a task in each of the forms that it may have. The streams: `listed` and `function`,
whose tasks are had by number, where `repeated` compares a task with itself; `iterated`, whose tasks
come one after the other. `promises` says what each promises, `refusals` why something is no tasks.
"""
