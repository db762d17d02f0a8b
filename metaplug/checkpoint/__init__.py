"""A learner's state in one safetensors file, which other tools read too, with a digest over it.

Reading executes nothing, and checks everything before using it.

* `file` reads and writes the bytes; `encoding` makes tensors and JSON of a state, and a state of
  them; `form` has the fields of a state and their bounds.
* `state` takes the state of a learner; `giving` gives it to one, which `fit` refuses where the two
  differ.
* `loading` makes the learner of a file; `rehearsal` tries that before it takes memory.
"""

from metaplug.checkpoint.file import FORMAT, check_writable, packed, read, write
from metaplug.checkpoint.form import Count
from metaplug.checkpoint.giving import give_state
from metaplug.checkpoint.loading import load, naming
from metaplug.checkpoint.rehearsal import rehearse
from metaplug.checkpoint.state import state_of

__all__ = [
    "FORMAT",
    "Count",
    "check_writable",
    "give_state",
    "load",
    "naming",
    "packed",
    "read",
    "rehearse",
    "state_of",
    "write",
]
