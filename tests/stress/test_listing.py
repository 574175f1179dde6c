"""Lists of files as long as those of ImageNet."""

from tests.ssl.data.test_listing import assert_small


def test_a_million_files_take_less_than_a_gibibyte():
    assert_small(1_000_000)
