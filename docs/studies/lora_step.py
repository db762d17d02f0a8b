"""What a meta-step of a language model with LoRA costs, beside a plain loop over tasks.

Run from the root of the project: python docs/studies/lora_step.py MODEL_FOLDER

MiniLM, LoRA of rank 4 on query and value, and a head; 4 tasks of 5 ways, 1 shot and 1 query, 24
tokens a text of which up to 24 count, 3 inner steps, second order, one thread. The plain loop
writes the same mathematics task by task, by torch.func.functional_call and torch.autograd.grad.
Every way runs in a process of its own, in turn, for several rounds; the table has the fastest
meta-step of each, the largest resident memory, and how far its meta-gradient is from the loop's;
below it stands what the matrix products of the loop would take at the rate of one of them alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

TASKS, WAYS, TOKENS, STEPS, LR = 4, 5, 24, 3, 0.05
WAYS_TO_RUN = ("loop, eager attention", "loop", "sequential", "vectorized", "auto, cache_frozen")
ROUNDS, REPEATS = 2, 3


def measure(folder: str, way: str) -> dict[str, float]:
    """Time one way; give seconds, MiB, and a number that stands for its meta-gradient."""
    import resource  # noqa: PLC0415 -- the parent process needs none of these

    import torch  # noqa: PLC0415
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    from metaplug import MetaLearner, TaskBatch  # noqa: PLC0415
    from metaplug.core.recording import recording  # noqa: PLC0415
    from metaplug.models.factories import make_model  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = make_model(f"transformers:{folder}", (TOKENS,), WAYS, {"rank": 4})
    if "eager" in way:
        model.body.set_attn_implementation("eager")
    lengths = torch.randint(6, TOKENS + 1, (2, TASKS, WAYS))
    lengths[:, :, 0] = TOKENS
    mask = (torch.arange(TOKENS) < lengths[..., None]).long()
    ids = torch.randint(1000, 20000, mask.shape) * mask
    y = torch.arange(WAYS).expand(TASKS, WAYS)
    x = [{"input_ids": ids[part], "attention_mask": mask[part]} for part in range(2)]
    batch = TaskBatch(x[0], y, x[1], y)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}

    def plain() -> list[torch.Tensor]:
        total = torch.zeros(())
        for task in range(TASKS):
            fast = dict(trained)

            def loss(part: int, fast: Any = None, task: int = task) -> torch.Tensor:
                given = {key: each[task] for key, each in x[part].items()}
                logits = torch.func.functional_call(model, fast, (), given)
                return torch.nn.functional.cross_entropy(logits, y[task])

            for _ in range(STEPS):
                gradients = torch.autograd.grad(loss(0, fast), [*fast.values()], create_graph=True)
                fast = {
                    name: each - LR * gradient
                    for (name, each), gradient in zip(fast.items(), gradients, strict=True)
                }
            total = total + loss(1, fast) / TASKS
        return [*torch.autograd.grad(total, [*trained.values()])]

    if way.startswith("loop"):
        model.train()

        def step() -> list[torch.Tensor]:
            with recording():
                return plain()
    else:
        options: dict[str, Any] = {"task_batching": way.partition(",")[0]}
        learner = MetaLearner(
            model, inner_lr=LR, inner_steps=STEPS, cache_frozen="cache" in way, **options
        )

        def step() -> list[torch.Tensor]:
            found = learner.meta_gradients(batch)
            return [found[name] for name in trained]

    with FlopCounterMode(display=False) as counted:
        gradient = torch.cat([each.flatten() for each in step()])
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    torch.manual_seed(1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    direction = torch.randn(len(gradient)) / gradient.norm()
    return {
        "seconds": min(seconds),
        "MiB": memory,
        "gradient": float(gradient @ direction),
        "operations": counted.get_total_flops(),
        "rate": rate_of_a_product(TASKS * WAYS * TOKENS, 384),
    }


def rate_of_a_product(rows: int, width: int) -> float:
    """Floating-point operations a second in a product of (rows, width) and (width, width)."""
    import torch  # noqa: PLC0415

    seconds, one, other = [], torch.randn(rows, width), torch.randn(width, width)
    for _ in range(50):
        begun = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - begun)
    return 2 * rows * width * width / min(seconds)


def main() -> None:
    """Run every way in turn, and print the table in Markdown."""
    folder, found = sys.argv[1], {way: [] for way in WAYS_TO_RUN}
    for _ in range(ROUNDS):
        for way in WAYS_TO_RUN:
            command = [sys.executable, "-W", "ignore", __file__, folder, way]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[way].append(json.loads(answer.splitlines()[-1]))
    first = found[WAYS_TO_RUN[1]][0]
    print("| way | seconds a meta-step | times the loop | peak memory, MiB | gradient, apart |")
    print("|---|---|---|---|---|")
    base = min(each["seconds"] for each in found[WAYS_TO_RUN[1]])
    for way, each in found.items():
        best = min(one["seconds"] for one in each)
        apart = abs(each[0]["gradient"] / first["gradient"] - 1)
        memory = max(one["MiB"] for one in each)
        print(f"| {way} | {best:.2f} | {base / best:.2f} | {memory:.0f} | {apart:.0e} |")
    work, rate = first["operations"], max(one["rate"] for each in found.values() for one in each)
    print(
        f"\n{work / 1e9:.0f} billion floating-point operations in products, at {rate / 1e9:.0f} "
        f"billion a second at the most: at least {work / rate:.2f} s"
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
