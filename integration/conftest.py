"""Fixtures: one PostgreSQL for all tests of a run, a proxy for each test."""
import faulthandler
import os
import signal
import sys

import pytest

import harness


@pytest.fixture(scope="session")
def _server():
    with harness.Postgres(max_connections=100, plain=harness.KIND == "direct") as server:
        yield server


@pytest.fixture
def pg(_server):
    """The shared server; if a test before left it down, it is started."""
    if _server.process.poll() is not None:
        _server.start()
    # What a test before left running must not be counted by this one.
    _server.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE client_port > 0 AND state = 'active' AND pid <> pg_backend_pid()")
    harness.poll(lambda: _server.count() == 0 or harness.KIND == "direct", 10, "no connection of another test is left")
    return _server


@pytest.fixture
def proxies(pg):
    """start(config=None, **keys) -> a running proxy in front of the shared server; all are stopped and checked at the end."""
    started = []

    def start(config=None, server=None, **keys):
        started.append(harness.make_proxy(server or pg, config, **keys))
        return started[-1]

    yield start
    errors = []
    for proxy in started:
        try:
            proxy.close()
        except AssertionError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@pytest.fixture
def proxy(proxies):
    return proxies()


@pytest.fixture
def small(proxies):
    """Two server connections only, so that every mistake in sharing shows."""
    return proxies({"pool": {"max": 2, "connectionTimeoutMillis": 30000}})


def pytest_runtest_protocol(item):
    # A hang ends the run with every thread's stack instead of with silence.
    faulthandler.dump_traceback_later(float(os.environ.get("TEST_TIMEOUT", "180")), exit=True, file=_stderr)


def pytest_sessionfinish():
    faulthandler.cancel_dump_traceback_later()


def pytest_collection_modifyitems(items):
    if harness.KIND == "pgbouncer":
        for item in items:
            if "generic" not in item.keywords:
                item.add_marker(pytest.mark.skip(reason="only pgsidecar"))


def pytest_configure(config):
    global _stderr
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # fixtures stop what they have started
    _stderr = os.dup(2)  # before pytest captures it
    config.addinivalue_line("markers", "generic: makes sense with another pooler too (HARNESS_PROXY=pgbouncer)")
