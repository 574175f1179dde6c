"""Words that fit one and many."""

import pytest

from gradmix.eval.calls import Scores
from gradmix.eval.counted import counted
from gradmix.eval.scoring.scorer import Score


@pytest.mark.parametrize(
    ("count", "what", "text"),
    [(0, "image", "0 images"), (1, "known class", "1 known class"), (2, "known class", "2 known classes")],
)
def test_one_and_many(count, what, text):
    assert counted(count, what) == text


def test_a_single_image_is_one():
    assert repr(Scores([Score("a.png", 0.5, "cat")], 0.7)).startswith("1 image, 0 unknown (")
    assert repr(Scores([])).startswith("0 images, ")
