"""Two ranks on two CUDA devices, through NCCL, train as one does."""

import subprocess
import sys

import pytest
import torch

from metaplug.experiments.runs import read_metrics

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason="torch finds fewer than two CUDA devices"
    ),
]

OPTIONS = [
    *(
        "train",
        "--with",
        "gradient-sharing",
        "--tasks",
        "sinusoid",
        "--model",
        "mlp",
        "--inner-lr",
        "0.01",
        "--tasks-per-batch",
        "5",
    ),
    *("--iterations", "4", "--device", "cuda", "--set", "training.validate_every=2"),
]


def test_two_devices_train_as_one_does(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    subprocess.run(
        [*launch, "-m", "metaplug", *OPTIONS, "--name", "two"],
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    subprocess.run(
        [sys.executable, "-m", "metaplug", *OPTIONS, "--name", "one"],
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    one, two = (read_metrics(tmp_path / "runs" / name) for name in ("one", "two"))
    assert [line["outer_loss"] for line in two] == pytest.approx(
        [line["outer_loss"] for line in one], rel=1e-3
    )
    means = [
        [line["validation"]["mean"] for line in lines if "validation" in line]
        for lines in (one, two)
    ]
    assert means[1] == pytest.approx(means[0], rel=1e-3)
