"""`pytest -p tests.rotation`: of the selected tests, in a circle from one that is named, as many as a time allows.

For tests that are too many to run at once: each run is given another beginning, so that all are run in time.
"""

import time

import pytest


def pytest_addoption(parser) -> None:
    parser.addoption("--beginning", type=int, default=0, help="any number: of the test that is first, modulo their count")
    parser.addoption("--seconds", type=float, default=240.0, help="after which no test begins")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """After the selection by marks."""
    first = config.option.beginning % max(1, len(items))
    items[:] = items[first:] + items[:first]
    config.no_test_begins = time.monotonic() + config.option.seconds


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    if time.monotonic() > item.config.no_test_begins:
        pytest.skip("another run's turn")
