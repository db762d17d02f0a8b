"""How a meta-step runs: the device, the random streams, the guards before the first step, and how tasks are batched."""
