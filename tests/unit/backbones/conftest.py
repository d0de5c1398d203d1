"""The tests of this folder hold for every family, those elsewhere for one of each kind."""

import pytest

from memdlm.backbones.tiny import TINY_FAMILIES


@pytest.fixture(params=TINY_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param
