"""What lm-eval's imports warn of is not ours to mend."""

import pytest

from tests.unit.evaluation.harness.asking import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()
