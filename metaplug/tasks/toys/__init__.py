"""Tasks that are computed: regression of a function that every task has for itself.

`functions` is the stream and the source that all toys share; `sinusoid` and `harmonic` are toys.
"""
