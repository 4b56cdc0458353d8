"""Does pytest give all tests of a group to one worker, so that what they share is made once?"""

import pytest


@pytest.mark.xdist_group("workers")
def test_who_distributes_tests_knows_their_groups(request: pytest.FixtureRequest) -> None:
    """pytest-xdist 3.8 tells a group by the end of a test's name, which pytest 9.2 no longer lets it change: a run of all tests
    then takes minutes longer, and nothing says why."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("tests are not distributed by their groups: pytest -n 2 --dist loadgroup")
    assert request.node.nodeid.endswith("@workers")
