"""What explain says of the inner loop of a configuration."""

from __future__ import annotations

import pytest

from metaplug.cli.main import main


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            "--with gradient-sharing",
            [
                "adapts every trainable parameter of the model",
                "starts the shared values, in every task",
                "update the inner optimizer, sgd",
                "derivative order 2",
                "meta-gradients through the loop",
            ],
        ),
        (
            "--preset cavia --with alfa",
            [
                "adapts the parameters that cavia selects, and the task parameters cavia.*",
                "update alfa, in the place of sgd",
            ],
        ),
        ("--preset l2f", ["starts the shared values, as l2f changes them for each task"]),
        (
            "--preset imaml --inner-steps 3",
            ["derivative order 0 (steps 0 to 1), 1 (step 2)", "meta-gradients imaml"],
        ),
        (
            "--preset maml++ --iterations 1000",
            ["derivative order 1 from iteration 1 on; 2 from iteration 501 on"],
        ),
        ("--with derivative-order:switch=7", ["1 from iteration 1 on; 2 from iteration 8 on"]),
    ],
)
def test_explain_says_what_adapts_and_how(
    options: str,
    lines: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *options.split()])
    assert stopped.value.code == 0
    words = " ".join(capfd.readouterr().out.split())
    for line in lines:
        assert line in words, words
