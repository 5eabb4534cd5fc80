"""The SIMT machine's modules, built once per session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import simt_builder


@pytest.fixture(scope="session")
def built_simt() -> ModuleType:
    reason = simt_builder.why_not()
    if reason:
        pytest.skip(reason)
    return simt_builder.build_simt()


@pytest.fixture
def simt(built_simt: ModuleType) -> Iterator[ModuleType]:
    """The kernels on the machine; whatever a test switches on is switched off after it."""
    yield built_simt
    built_simt.configure()
    built_simt.clear_buffers()
