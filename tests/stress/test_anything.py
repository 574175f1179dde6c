"""Many of any values, names and images; see tests/anything.py."""

import pytest

from tests.anything import CHECKS, holds

EXAMPLES = {"values of keys": 2000, "arguments": 1000, "names": 100, "images": 10_000}


@pytest.mark.parametrize("name", CHECKS)
def test_anything(name, cases, tell):
    holds(*CHECKS[name], cases(EXAMPLES[name]))
    tell(f"{cases(EXAMPLES[name])} cases")
