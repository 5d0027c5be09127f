"""Each test here takes `device`: on "cpu" in every run, on "cuda" where there is one.

What a device computes is held against plain kernels on the CPU, without oneDNN: other code in another order, so that the
comparison can fail on the CPU too.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from robustkd.engines.pytorch import full_products

WITHOUT = "no CUDA device: this needs a GPU and a torch that sees it"
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=WITHOUT)])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", CUDA])


@contextmanager
def _plain_kernels() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # of setting any of its flags
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@pytest.fixture
def plain() -> Callable[[], object]:
    """A context in which the CPU runs other kernels: the reference of every comparison."""
    return _plain_kernels


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """No TF32: it keeps ten bits, and what is compared here are the last ones."""
    with full_products():
        yield
