"""The options of the test command. What tests share is in shared.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_configure(config):
    hands_out = getattr(config.option, "numprocesses", 0) and not hasattr(config, "workerinput")
    if not hands_out:  # that process of xdist's runs no test, and importing torch takes seconds in which the others wait for it
        config.pluginmanager.import_plugin("shared")


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="one case of each test, none of the slow ones: for the inner loop")
    parser.addoption("--device", choices=("cpu", "cuda"), help="run the tests that compute on a device there, and no others")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast"):
        first = {item.nodeid.split("[")[0]: item for item in reversed(items)}
        items[:] = [item for item in reversed(first.values()) if "slow" not in item.keywords]
    items.sort(key=lambda item: "slow" not in item.keywords)  # first: no core is left waiting for another's at the end
    if config.getoption("--device"):
        items[:] = [item for item in items if "device" in item.fixturenames]
