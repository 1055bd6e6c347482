"""The examples of the documentation."""

import doctest
import importlib
import pathlib

import numpy as np
import pytest

import foveal

MODULES = ["", "_attention", "_caches", "_core", "_positions", "exact", "linear", "memory", "sparse"]
ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    module = importlib.import_module(f"foveal.{name}".rstrip("."))
    names = {"np": np, "foveal": foveal}
    failed, attempted = doctest.testmod(module, extraglobs=names)
    assert attempted and not failed


def test_the_page_of_the_python_package():
    """Blocks of Python in docs/python.md and the README, those that name PyTorch or a model aside."""
    for page in ("docs/python.md", "README.md"):
        blocks = (ROOT / page).read_text().split("```python\n")[1:]
        names: dict = {}
        ran = 0
        for block in blocks:
            code = block.split("```")[0]
            if "torch" not in code and "transformers" not in code:
                exec(compile(code, page, "exec"), names)  # noqa: S102
                ran += 1
        assert ran, page
