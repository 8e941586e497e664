"""A pod's end, rehearsed with a real application (node-postgres, psycopg) and the kubelet's signals (kubelet.py)."""
import json
import os
import pathlib
import signal
import subprocess
import sys

import psycopg
import pytest

import harness
import kubelet
import wire
from harness import DATABASE, PASSWORD, USER

DRIVERS = pathlib.Path(__file__).parent / "drivers"
COMMANDS = {"node-postgres": ["node", DRIVERS / "application.js"], "psycopg": [sys.executable, DRIVERS / "application.py"]}
applications = pytest.mark.parametrize("kind", COMMANDS)
# As conf/kubernetes/classic-sidecar.yaml has it.
CLASSIC = {"shutdown": {"acceptWhileDraining": True, "delayMillis": 500}}


@pytest.fixture
def start(proxies, pg, tmp_path):
    """start(kind, config, after) -> a Pod whose application works."""
    started = []

    def begin(kind, config=None, after=0):
        pg.sql("DROP TABLE IF EXISTS orders; CREATE TABLE orders (n int); GRANT ALL ON orders TO app", database=DATABASE)
        sidecar = proxies(config)
        environment = {**os.environ, "DATABASE_URL": sidecar.url(), "AFTER_MILLIS": str(after)}
        application = subprocess.Popen(COMMANDS[kind], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(application)
        harness.poll(lambda: application.poll() is not None or pg.count("query LIKE '%%pg_sleep(0.3)%%' AND state = 'active'") == 3, 30, "it works")
        assert application.poll() is None, application.stderr.read()
        return kubelet.Pod(sidecar, application)

    yield begin
    for application in started:
        application.kill()
        application.communicate()


def report(pod):
    out, errors = pod.application.communicate()
    assert out, errors
    return json.loads(out)


def told(pod, pg):
    """All went well; the application's report."""
    said = report(pod)
    assert pod.killed == [] and pod.codes == {"application": 0, "sidecar": 0}, pod.sidecar.log_text()
    assert said["failed"] == [] and all(said["done"].values()), said
    assert pod.liveness.failures == [] and pod.liveness.answers > 0
    assert harness.poll(lambda: pg.count("usename = 'app'") == 0, what="no connection is left") is True
    print(f"the sidecar ended {pod.lag * 1000:.0f} ms after the application")
    return said


@applications
def test_native_sidecar(start, pg, kind):
    pod = start(kind)
    pod.terminate(grace=30)
    told(pod, pg)
    assert pod.lag < 2


@applications
def test_native_sidecar_serves_what_comes_after_the_applications_sigterm(start, pg, kind):
    pod = start(kind, after=1500)
    pod.terminate(grace=30)
    told(pod, pg)
    assert pod.liveness.ready[0] == 200


@applications
def test_classic_sidecar(start, pg, kind):
    """SIGTERM to both at once: requests, transactions and new connections go on for as long as the application wants."""
    pod = start(kind, CLASSIC, after=1500)
    pod.terminate(grace=30, native=False)
    told(pod, pg)
    assert pod.liveness.ready[-1] == 503


def test_classic_sidecar_whose_application_has_no_connection_at_the_time(proxies):
    """shutdown.delayMillis: there is nobody to wait for, and still somebody comes."""
    sidecar = proxies({"shutdown": {"acceptWhileDraining": True, "delayMillis": 1000}})
    sidecar.signal(signal.SIGTERM)
    harness.poll(lambda: sidecar.http("/health/ready")[0] == 503, what="it is leaving")
    assert "delayMillis" in sidecar.json("/health/ready")[1]["reason"] and sidecar.json("/health/live")[0] == 200
    with sidecar.connect() as late:
        assert late.execute("SELECT 1").fetchone() == (1,)
        harness.poll(lambda: "draining" in sidecar.log_text(), what="the delay is over")
        with sidecar.connect() as later:
            assert later.execute("SELECT 1").fetchone() == (1,)
        assert sidecar.running()
    assert sidecar.wait_exit() == 0


def test_delay_alone_then_a_drain_as_ever(proxies):
    sidecar = proxies({"shutdown": {"delayMillis": 700}})
    idle = sidecar.connect()
    sidecar.signal(signal.SIGTERM)
    harness.poll(lambda: sidecar.http("/health/ready")[0] == 503, what="it is leaving")
    with sidecar.connect() as new:
        assert (new.execute("SELECT 1").fetchone(), idle.execute("SELECT 2").fetchone()) == ((1,), (2,))
    assert sidecar.wait_exit() == 0
    with pytest.raises(psycopg.Error):
        idle.execute("SELECT 3")


def test_drain_by_http_does_not_wait_for_the_delay(proxies):
    sidecar = proxies({"shutdown": {"delayMillis": 60000}})
    sidecar.signal(signal.SIGTERM)
    harness.poll(lambda: sidecar.http("/health/ready")[0] == 503, what="it is leaving")
    assert sidecar.http("/api/admin/drain", "POST")[0] == 200
    assert sidecar.wait_exit(20) == 0


def test_second_signal_in_the_delay_ends_at_once(proxies):
    sidecar = proxies({"shutdown": {"delayMillis": 60000}})
    sidecar.expect_exit = 3
    sidecar.signal(signal.SIGTERM)
    harness.poll(lambda: sidecar.http("/health/ready")[0] == 503, what="it is leaving")
    sidecar.signal(signal.SIGTERM)
    assert sidecar.wait_exit(20) == 3


@applications
def test_forced_end_tells_whom_it_cut(start, pg, kind):
    """An application that never ends, in a pod whose grace period is longer than shutdown.timeoutMillis."""
    pod = start(kind, {"shutdown": {"timeoutMillis": 500, "acceptWhileDraining": True}}, after=600000)
    pod.sidecar.expect_exit = 3
    pod.terminate(grace=6, native=False)
    assert pod.killed == ["application"] and pod.codes["sidecar"] == 3
    text = pod.sidecar.log_text()
    assert 'application "' + ("web" if kind == "node-postgres" else "long") + '") is cut off after 500 ms' in text
    assert harness.poll(lambda: pg.count("usename = 'app'") == 0, what="the queries were cancelled") is True
    assert pod.liveness.failures == []


@applications
def test_node_pressure(start, pg, kind):
    """A grace period too short for anybody: the application is killed in the middle, the sidecar has its 2 s."""
    pod = start(kind, after=600000)
    pod.terminate(grace=0.5)
    assert pod.killed == ["application"] and pod.codes["sidecar"] == 0, pod.sidecar.log_text()
    assert pod.liveness.failures == []
    assert harness.poll(lambda: pg.count("usename = 'app'") == 0, what="nothing is left") is True


def test_queries_of_a_killed_application_are_cancelled(proxies, pg):
    """Not left to run for nobody, as they would be if the connection just ended."""
    sidecar = proxies()
    code = "import psycopg, sys; psycopg.connect(sys.argv[1]).execute('SELECT pg_sleep(600)')"
    application = subprocess.Popen([sys.executable, "-c", code, sidecar.conninfo()])
    harness.poll(lambda: pg.count("query LIKE '%%pg_sleep(600)%%' AND state = 'active'"), what="it runs")
    pod = kubelet.Pod(sidecar, application)
    pod.terminate(grace=0.2)
    assert pod.codes["sidecar"] == 0
    assert harness.poll(lambda: pg.count("query LIKE '%%pg_sleep(600)%%' AND state = 'active'") == 0, what="it was cancelled") is True


@pytest.mark.parametrize("accept", [True, False])
def test_who_connects_at_the_last_moment_is_answered(proxies, accept):
    """Never a reset: connections that wait to be accepted when the last client leaves are served, or told that it ends."""
    sidecar = proxies({"shutdown": {"acceptWhileDraining": accept}})
    last = sidecar.connect()
    sidecar.signal(signal.SIGSTOP)  # so that all comes at once
    waiting = [wire.Wire(sidecar.port) for _ in range(5)]
    last.close()
    sidecar.signal(signal.SIGTERM)
    sidecar.signal(signal.SIGCONT)
    for one in waiting:
        with one:
            refusal = one.login(USER, PASSWORD, DATABASE)
            if accept:
                assert refusal is None and one.value("SELECT 1") == "1"
            else:  # at its login, or just after it
                codes = [refusal.error["C"]] if refusal else [m.error["C"] for m in one.closed() if m.type == "E"]
                assert codes in (["57P03"], ["57P01"])
    assert sidecar.wait_exit() == 0
