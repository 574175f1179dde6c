"""A few of any values, names and images; ``make stress`` looks at many. See tests/anything.py."""

import pytest

from tests.anything import CHECKS, holds

EXAMPLES = {"values of keys": 15, "arguments": 8, "names": 2, "images": 120}


@pytest.mark.usefixtures("quick_evaluation")
@pytest.mark.parametrize("name", CHECKS)
def test_anything(name):
    holds(*CHECKS[name], EXAMPLES[name])
