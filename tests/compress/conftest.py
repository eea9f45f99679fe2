import pytest


@pytest.fixture
def tokenizer(tmp_path):
    """Of the toy task; imported here, as a conftest is read on machines without transformers, too."""
    from tests import tiny
    from tests.compress import toys

    return tiny.tokenizer(tmp_path, toys.WORDS)
