"""Every example in a docstring of the contract and the core gives what it says."""

import doctest
import pkgutil
from importlib import import_module

import pytest
import torch

import metaplug.contract
import metaplug.core

NAMES = [
    f"{package.__name__}.{module.name}"
    for package in (metaplug.contract, metaplug.core)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_give_what_they_say(name):
    result = doctest.testmod(import_module(name), extraglobs={"torch": torch})
    assert result.failed == 0


def test_every_module_of_the_contract_has_an_example():
    without = [name for name in NAMES if ".contract." in name and not examples(name)]
    assert without == []


def examples(name):
    """The examples of a module."""
    found = doctest.DocTestFinder().find(import_module(name))
    return [example for test in found for example in test.examples]
