"""What every test gets: a seed, poisoned memory, a device. Needs no torch, for tests/compile."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# A test never waits for a network that may not be there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A test decides as on a machine that nobody has profiled: there is no such folder.
os.environ["TILEWISE_PROFILES"] = os.path.join(os.path.dirname(__file__), "no_profiles")

try:
    import torch
except ModuleNotFoundError:
    torch = None  # type: ignore[assignment]


def _has_gpu() -> bool:
    if torch is None or not torch.cuda.is_available():
        return False
    from triton import knobs

    return not knobs.runtime.interpret


HAS_GPU = _has_gpu()


def pytest_configure() -> None:
    if torch is not None and "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, without TRITON_INTERPRET"))


@pytest.fixture
def device() -> str:
    """The GPU, or the CPU without one or for the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    if torch is None:
        yield
        return
    from tests.cases import poisoned_empty

    torch.manual_seed(0)
    with poisoned_empty():
        yield
