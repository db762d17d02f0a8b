"""One HTML page of a study or of runs, which needs nothing beside itself.

`gather` reads folders into `material`, several runs through `small_study`. `asked`, `findings`,
`tables` with their `notes`, and `early` put it into `words`; `curves`, `over_training`,
`inner_steps` and `sensitivity` choose the pictures, of the rows that `chosen` finds. Pictures are
`panels` until `drawing` makes SVG of them, in a `frame` with `scales`. `repeating` says how to get
them again, and `writing` fills in the template.
"""
