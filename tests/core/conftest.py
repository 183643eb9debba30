"""Problems of the contrastive step as a fixture; new tests import ``helpers.problems`` themselves."""

from __future__ import annotations

from types import ModuleType

import pytest

from helpers import problems as shared


@pytest.fixture(scope="session")
def problems() -> ModuleType:
    return shared
