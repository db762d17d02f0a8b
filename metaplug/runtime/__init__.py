"""How a meta-step runs: devices and processes, the random streams, the guards before the first step, and how tasks are batched."""
