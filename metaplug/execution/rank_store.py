"""The store in which ranks leave their addresses, and why the first to fail did."""

from __future__ import annotations

import time
import uuid

from torch.distributed.distributed_c10d import PrefixStore, Store


def store_of_this_start(store: Store, rank: int, size: int, timeout: float) -> Store:
    """Return a part of the store that holds nothing of ranks which have ended.

    torchrun keeps one store when it starts ranks again, with the addresses of the former ones, and
    counts restarts on each machine for itself. So rank 0 draws a name for this start. Another rank
    asks for it under a word of its own, and confirms it, as rank 0 may read a former rank's word.

    Args:
        timeout: seconds that rank 0 waits for the others; they wait as long as the store does.

    Raises:
        RuntimeError: not all have come in time.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"metaplug/ask/{rank}", word)
        name = store.get(f"metaplug/answer/{word}").decode()
        store.set(f"metaplug/{name}/{rank}", "")
        return PrefixStore(f"metaplug/{name}", store)
    deadline, others = time.monotonic() + timeout, range(1, size)
    while not store.check([f"metaplug/{word}/{other}" for other in others]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"they have not come within {timeout:g} seconds")
        for ask in [f"metaplug/ask/{other}" for other in others]:
            if store.check([ask]):
                store.set(f"metaplug/answer/{store.get(ask).decode()}", word)
        time.sleep(0.01)
    return PrefixStore(f"metaplug/{word}", store)
