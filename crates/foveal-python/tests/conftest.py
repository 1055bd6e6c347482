"""What examples in the documentation have at hand."""

import numpy as np
import pytest

import foveal


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace["np"] = np
    doctest_namespace["foveal"] = foveal
