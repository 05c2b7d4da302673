"""Shared fixtures: GPU policy, quiet threads, small models."""

import base64
import logging
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is imported
    if find_spec("triton"):
        from . import interpreter

        interpreter.patch_once()

from sfpk_kernels.coordinates import coverage
from sfpk_kernels.search import settings

REQUIRE_GPU = os.environ.get("SFPK_REQUIRE_GPU") == "1"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if REQUIRE_GPU:
            pytest.fail("SFPK_REQUIRE_GPU=1, and there is no CUDA device", pytrace=False)
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_mode_stays():
    """A dispatch mode left on shows in whatever test compiles next, a level of the log in whatever reads it next."""
    level = logging.getLogger("sfpk_kernels").level
    yield
    assert logging.getLogger("sfpk_kernels").level == level
    assert not torch._C._len_torch_dispatch_stack()
    assert not is_in_torch_dispatch_mode()


@pytest.fixture(autouse=True)
def _all_is_said(monkeypatch):
    """Small runs are poor on purpose; that it is said only once would depend on the order of the tests."""
    monkeypatch.setattr(settings, "_said", Everything())
    monkeypatch.setattr(coverage, "_said", Everything())


class Everything:
    def __contains__(self, words):
        return True


# Tests of the ops, in which memory that nobody has written holds NaN, or the largest integer.
OPS = {
    "derivatives", "edges_of_ops", "masked_weights", "packed_masks", "registration", "selection_backends",
    "selection_constraints", "selection_gpu", "shared_coordinates", "topk_mask", "transition", "transition_backends",
    "transition_row", "transition_stages",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _poisoned_memory(request):
    if request.module.__name__.rpartition("test_")[2] not in OPS:
        yield
        return
    # torch fills what empty() returns, in C++ too, where algorithms have to be deterministic.
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def one_tile(monkeypatch):
    """Interpreted, Triton's selection goes through one tile a program instead of 16, of which few columns fill one."""
    if not torch.cuda.is_available() and find_spec("triton"):
        from sfpk_kernels.ops.selection import triton_backend

        monkeypatch.setattr(triton_backend, "_TILES", 1)
        monkeypatch.setattr(triton_backend, "_CHUNK", triton_backend._BLOCK)


# A picture of one point.
POINT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures of reports are made but not drawn, which takes most of a report's time: a point is written instead."""
    if find_spec("matplotlib"):
        from matplotlib.figure import Figure

        def savefig(self, target, **options):
            target.write_bytes(POINT) if isinstance(target, Path) else target.write(POINT)

        monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.fixture
def mlp():
    """8 → 12 → 4, tanh: no dead units, so no ties by zero gradients. d = 144."""
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


@pytest.fixture
def convnet():
    """Small batch-norm net with trained-looking running statistics and dropout."""
    # fmt: off
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4),
    )
    # fmt: on
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 2, 6, 6))
    return model.eval()


@pytest.fixture
def vectors():
    """Batches (x, y) for the mlp: a list of ten."""
    return [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(10)]


@pytest.fixture
def images():
    """Batches (x, y) for the convnet: a list of ten."""
    return [(torch.randn(16, 2, 6, 6), torch.randint(4, (16,))) for _ in range(10)]
