"""A function run over many items, several at once: in processes here, or on a cluster.

Nothing here knows meta-learning. `dispatch` hands the items out and takes the results in;
`attempt` runs one item where it was sent; `pool` is what the dispatch asks of a place to run, and
the places are `processes` of this machine, and `clusters`.
"""

from metaplug.experiments.parallel.attempt import Failed
from metaplug.experiments.parallel.dispatch import Backend, in_parallel

__all__ = ["Backend", "Failed", "in_parallel"]
