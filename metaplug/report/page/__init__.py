"""One HTML page of a study or of runs, which needs nothing beside itself.

`gather` reads folders, several runs through `small_study`; `findings` says what they found, in
sentences and tables; `curves`, `inside` and `sensitivity` choose the pictures, which are `panels`
until `drawing` makes SVG of them on `scales`; `repeating` says how to get them again; `writing`
fills in the template.
"""
