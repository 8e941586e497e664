"""In front of providers' databases: Neon, Supabase, RDS, Cloud SQL, as their stand-ins behave (cloud.py)."""
import os
import pathlib
import re
import subprocess
import threading
import time

import psycopg
import pytest
import yaml

import cloud
import harness
import wire
from harness import DATABASE, OTHER_DATABASE, OTHER_PASSWORD, OTHER_USER, PASSWORD, USER

ENDPOINT = "ep-cool-name-123"
HOST = f"{ENDPOINT}.eu.db.test"
IAM = "iam.user@project"


@pytest.fixture(scope="module")
def server():
    with harness.Postgres(max_connections=40, plain=True) as server:
        rules = server.data / "pg_hba.conf"
        rules.write_text(f'hostssl all "{IAM}" all password\n' + rules.read_text())  # in clear text, as RDS wants it for IAM
        server.sql(f'CREATE ROLE "{IAM}" LOGIN')
        server.restart()
        yield server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tls")
    harness.make_certificates(directory, ("DNS:*.eu.db.test", "DNS:localhost"))
    return directory


@pytest.fixture
def router(server, certificates):
    """router(...) -> a Router, closed at the end."""
    routers = []

    def start(**keys):
        routers.append(cloud.Router(server, certificates, **keys))
        return routers[-1]

    yield start
    for one in routers:
        one.__exit__()


@pytest.fixture
def neon(router):
    return router(endpoint=ENDPOINT, parameters=cloud.FORWARDED)


def url(router, certificates, query="", user=USER, password=PASSWORD, host=HOST):
    secret = "" if password is None else ":" + harness.percent(password)
    return (f"postgresql://{harness.percent(user)}{secret}@{host}:{router.port}/{DATABASE}?hostaddr=127.0.0.1&sslmode=verify-full"
            f"&sslrootcert={certificates}/ca.crt{query}")


def compute_health(proxy):
    status, health = proxy.json("/api/monitoring/compute-health")
    assert status == 200
    return health


def stays(condition, seconds=1.0):
    """Whether it is true for as long as anything that is to happen at once would have taken."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not condition():
            return False
        time.sleep(0.02)
    return True


def at_rest(proxy):
    """All server connections that there are, are idle."""
    stats = proxy.stats()
    return stats["idleCount"] == stats["totalCount"] > 0


def logged(proxy, text):
    """Waits for it: the log is written by a thread of its own."""
    harness.poll(lambda: text in proxy.log_text(), what=f"the log says: {text}")


# ---- Neon

@pytest.mark.parametrize("direct", [False, True])
def test_the_endpoint_is_told_by_sni(proxies, neon, certificates, server, direct):
    proxy = proxies(url=url(neon, certificates, "&sslnegotiation=direct" if direct else ""), server=server)
    with proxy.connect() as client:
        assert client.execute("SELECT 1").fetchone() == (1,)
    assert neon.handshakes[0] == (HOST, "postgresql" if direct else None)


def test_the_endpoint_in_options(proxies, neon, certificates, server):
    """Of the URL, which passes it on, and of an application that has it in its own URL."""
    proxy = proxies({"pool": {"connectionTimeoutMillis": 500}}, url=url(neon, certificates, "&sslsni=0"), server=server)
    with pytest.raises(psycopg.OperationalError, match="Endpoint ID is not specified"):
        proxy.connect()
    proxy = proxies(url=url(neon, certificates, f"&sslsni=0&options=endpoint%3D{ENDPOINT}"), server=server)
    with proxy.connect(options=f"endpoint={ENDPOINT} -c work_mem=7MB") as client:
        assert client.execute("SHOW work_mem").fetchone() == ("7MB",)


def test_parameters_that_its_proxy_drops_are_applied(proxies, neon, certificates, server):
    wanted = [{"statement_timeout": "7s", "search_path": "pg_catalog", "TimeZone": "Asia/Tokyo", "client_encoding": "LATIN1"},
              {"statement_timeout": "8s", "DateStyle": "German, DMY", "client_encoding": "UTF8"}]
    proxy = proxies({"pool": {"max": 1}}, url=url(neon, certificates, "&client_encoding=LATIN2&application_name=x"), server=server)
    clients = [wire.Wire(proxy.port) for _ in range(3)]
    for client, parameters in zip(clients, [*wanted, {}]):
        assert client.login(USER, PASSWORD, DATABASE, **parameters) is None
    wanted.append({"client_encoding": "LATIN2", "statement_timeout": "0"})
    for _ in range(2):  # one server connection goes from hand to hand
        for client, parameters in zip(clients, wanted):
            assert {name: client.value(f"SHOW {name}") for name in parameters} == parameters
            assert client.parameters["client_encoding"] == parameters["client_encoding"]
    for reset in ("RESET ALL", "DISCARD ALL"):
        for client, parameters in zip(clients, wanted):
            client.ask(wire.query(reset))
            assert {name: client.value(f"SHOW {name}") for name in parameters} == parameters
    for client in clients:
        client.sock.close()
    assert {"client_encoding"} == {name for session in neon.sessions for name in session} - set(cloud.FORWARDED)


def test_a_pooler_behind_is_warned_of(proxies, certificates, server):
    host = f"{ENDPOINT}-pooler.eu.db.test"
    config = {"upstream": {"hostaddr": "127.0.0.1", "port": server.port, "sslmode": "disable"},
              "databases": {DATABASE: {}, "sold": {"upstream": {"url": f"postgresql://{USER}@x.pooler.supabase.com:6543/postgres?pgbouncer=true"}}}}
    proxy = proxies(config, url=f"postgresql://{USER}:{harness.percent(PASSWORD)}@{host}/{DATABASE}?connection_limit=3", server=server)
    checked = proxy.command("check", "--config", proxy.config_file)
    assert checked.returncode == 0
    logged(proxy, "databases.sold.upstream: ")
    for told in (proxy.log_text(), checked.stderr):
        assert f'upstream: host "{host}" is a pooler in transaction mode' in told and f'use host "{HOST}"' in told
        assert "databases.sold.upstream: " in told and "port 5432 of the same host" in told
        assert 'parameter "connection_limit" has no effect here' in told and 'parameter "pgbouncer" has no effect here' in told
    with proxy.connect() as client:
        client.execute("SELECT 1")
        assert compute_health(proxy)["isPooler"] is True


@pytest.mark.parametrize("pool", [{}, {"mode": "session"}, {"residueCheck": "never"}])
def test_max_is_weighed_against_what_the_server_allows(proxies, server, pool):
    reserved = 3
    users = {USER: {}, OTHER_USER: {"password": OTHER_PASSWORD}}
    proxy = proxies({"pool": {"max": 20, **pool}, "databases": {DATABASE: {}, OTHER_DATABASE: {}}, "users": users}, server=server)
    name = f"127.0.0.1:{server.port}"
    assert compute_health(proxy)["maxConnections"] is None and server.count() == 0
    with proxy.connect() as one:
        one.execute("SELECT 1")
        health = compute_health(proxy)
        assert (health["maxConnections"], health["reserved"], health["maxByUs"], health["fits"]) == (40, reserved, 20, True)
        logged(proxy, f"upstream {name} allows 40 connections - 3 reserved = 37; this pgsidecar may open 20: there is room for 1 such")
        assert "lower pool.max" not in proxy.log_text()
        with proxy.connect(OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE) as two:
            two.execute("SELECT 1")
            health = compute_health(proxy)
            assert (health["maxByUs"], health["fits"]) == (40, False)
    warning = (f"upstream {name} allows 40 connections - 3 reserved = 37; this pgsidecar may open 20 ({USER}@{DATABASE}) + 20 "
               f"({OTHER_USER}@{OTHER_DATABASE}) = 40: lower pool.max, or raise the server's max_connections")
    logged(proxy, warning)
    assert proxy.log_text().count(warning) == 1
    assert f'pgsidecar_upstream_usable_connections{{upstream="{name}"}} 37' in proxy.http("/metrics")[2]


def test_nothing_is_asked_while_there_are_no_clients(proxies, neon, certificates, server):
    """Whatever ends meanwhile (idle too long, too old) isn't replaced."""
    proxy = proxies({"pool": {"min": 2, "max": 3, "maxLifetimeSeconds": 3, "idleTimeoutMillis": 500}}, url=url(neon, certificates), server=server)
    assert neon.sessions == [] and stays(lambda: proxy.json("/health")[0] == 200 and neon.sessions == [])
    with proxy.connect() as client:
        client.execute("SELECT 1")
        harness.poll(lambda: server.count() >= 2, what="min is filled up")
    proxy.connect().close()
    harness.poll(lambda: proxy.stats()["connectingCount"] == 0 and stays(lambda count=len(neon.messages): len(neon.messages) == count, 0.3),
                 what="all that was begun is over")
    before, asked = len(neon.sessions), len(neon.asked())
    harness.poll(lambda: server.count() == 0, 20, "they have become too old")
    assert stays(lambda: (len(neon.sessions), len(neon.asked()), server.count()) == (before, asked, 0))


def test_an_idle_pool_is_gone_before_the_server_sleeps(proxies, neon, certificates, server):
    """Also of an application that stays connected, and also what `min` keeps."""
    config = {"pool": {"min": 2, "idleTimeoutMillis": 0, "maxLifetimeSeconds": 0}, "upstream": {"suspendAfterSeconds": 3}}
    proxy = proxies(config, url=url(neon, certificates), server=server)
    with proxy.connect() as client:
        client.execute("SELECT 1")
        harness.poll(lambda: server.count() == 2, what="min is filled up")
        harness.poll(lambda: server.count() == 0, 20, "all are closed")
        before = len(neon.sessions)
        assert [kind for kind, _ in neon.messages].count("X") == 2
        with proxy.connect():  # needs no server, since what it is told at its login is known
            assert stays(lambda: server.count() == 0 and len(neon.sessions) == before)
        assert client.execute("SELECT 2").fetchone() == (2,)
        harness.poll(lambda: server.count() == 2, what="min is filled up again")


def test_a_pool_that_the_server_has_ended_rests(proxies, neon, certificates, server):
    """It would wake it up again to have its `min`."""
    proxy = proxies({"pool": {"min": 2}}, url=url(neon, certificates), server=server)
    with proxy.connect() as client:
        client.execute("SELECT 1")
        harness.poll(lambda: server.count() == 2 and at_rest(proxy), what="min is filled up")
        assert compute_health(proxy)["lastSuspend"] is None
        before = len(neon.sessions)
        neon.suspend(wakes_in=0.0)
        harness.poll(lambda: proxy.stats()["totalCount"] == 0)
        assert stays(lambda: len(neon.sessions) == before)
        health = compute_health(proxy)
        assert health["lastSuspend"] is not None and health["status"] == "healthy"
        assert client.execute("SELECT 2").fetchone() == (2,)


@pytest.mark.parametrize("way", cloud.WAYS_TO_WAKE)
def test_a_cold_start_is_hidden(proxies, neon, certificates, server, way):
    """A compute that wakes up in 3 s; the client has the default 5."""
    proxy = proxies({"upstream": {"suspendAfterSeconds": 300}, "pool": {"min": 1}}, url=url(neon, certificates), server=server)
    with proxy.connect() as client:
        client.execute("SELECT 1")
        assert compute_health(proxy)["coldStarts"] in (0, 1)  # on a busy machine the first connect may be slow
        before = compute_health(proxy)["coldStarts"]
        harness.poll(lambda: at_rest(proxy))
        neon.suspend(way)
        harness.poll(lambda: proxy.stats()["totalCount"] == 0)
        if way == "refused":
            neon.begin_to_wake()
        ready = []
        watching = threading.Event()

        def watch():
            while not watching.wait(0.2):
                ready.append(proxy.http("/health/ready")[0])

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        others = harness.threads(3, lambda index: (proxy.connect().execute("SELECT 5") if index else client.execute("SELECT 5")).fetchone())
        watching.set()
        watcher.join()
        assert others == [(5,)] * 3
        assert set(ready) == {200}, "a server that wakes up isn't down"
        health = compute_health(proxy)
        assert health["coldStarts"] == before + 1 and health["lastColdStart"] is not None and health["lastColdStartMs"] >= 500
        assert f'pgsidecar_cold_starts_total{{upstream="{HOST}:{neon.port}"}} {before + 1}' in proxy.http("/metrics")[2]
        logged(proxy, "s after the first attempt to connect")


def test_one_that_does_not_wake_up_is_told_as_it_says(proxies, neon, certificates, server):
    proxy = proxies({"upstream": {"suspendAfterSeconds": 300}, "pool": {"connectionTimeoutMillis": 700}}, url=url(neon, certificates), server=server)
    neon.suspend("unreachable", 1000)
    with pytest.raises(psycopg.OperationalError, match="Couldn't connect to compute node"):
        proxy.connect()
    neon.suspend("held", 0)
    with proxy.connect() as client:
        assert client.execute("SELECT 1").fetchone() == (1,)


# ---- Supabase

def test_a_user_with_its_project(proxies, router, certificates, server):
    supabase = router(suffix=".projectref")
    proxy = proxies(url=url(supabase, certificates, user=f"{USER}.projectref"), server=server)
    with proxy.connect(user=f"{USER}.projectref") as client:
        assert client.execute("SELECT current_user").fetchone() == (USER,)
    proxy = proxies({"pool": {"connectionTimeoutMillis": 500}}, url=url(supabase, certificates), server=server)
    with pytest.raises(psycopg.OperationalError, match="Tenant or user not found"):
        proxy.connect()


# ---- RDS and Aurora, Cloud SQL

def test_a_server_that_wants_tls(proxies, pg):
    """rds.force_ssl; its certificate is one of a bundle's CAs."""
    bundle = pg.directory / "bundle.pem"
    other = pg.directory / "other"
    other.mkdir(exist_ok=True)
    harness.make_certificates(other)
    bundle.write_text((other / "ca.crt").read_text() + pg.ca.read_text())
    address = f"postgresql://{USER}:{harness.percent(PASSWORD)}@127.0.0.1:{pg.port}/{DATABASE}"
    with proxies(url=f"{address}?sslmode=verify-full&sslrootcert={bundle}").connect() as client:
        assert client.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone() == (True,)
    with pytest.raises(psycopg.OperationalError, match="no encryption"):
        proxies(url=f"{address}?sslmode=disable").connect()
    with pytest.raises(psycopg.OperationalError, match="(?s)verify failed.*sslrootcert"):
        proxies({"pool": {"connectionTimeoutMillis": 500}}, url=f"{address}?sslmode=verify-full&sslrootcert={other}/ca.crt").connect()


def test_a_certificate_that_does_not_name_the_host(proxies, router, certificates, server):
    """Cloud SQL's, by its IP address and its own CA."""
    instance = router()
    address = url(instance, certificates, host="10.1.2.3")
    with pytest.raises(psycopg.OperationalError, match="mismatch"):
        proxies({"pool": {"connectionTimeoutMillis": 500}}, url=address, server=server).connect()
    with proxies(url=address.replace("verify-full", "verify-ca"), server=server).connect() as client:
        assert client.execute("SELECT 1").fetchone() == (1,)


class Tokens:
    """Passwords of the role IAM that a program gives and that expire. Each run leaves a line in `runs`."""

    def __init__(self, server, directory, before="", after=""):
        self.server, self.runs = server, directory / "runs"
        self.runs.touch()
        self.program = directory / "give token"
        psql = f"psql -qX -h '{server.directory}' -p {server.port} -U postgres -d postgres"
        self.program.write_text(f"""#!/bin/sh
{before}
echo "$PGUSER $PGHOST $PGPORT" >> '{self.runs}'
token="token-$(wc -l < '{self.runs}')-$1"
unset PGHOST PGPORT PGUSER
{psql} -c "ALTER ROLE \\"{IAM}\\" PASSWORD '$token'" >&2 || exit 9
{after}
echo "$token"
""")
        self.program.chmod(0o755)

    def count(self):
        return len(self.runs.read_text().splitlines())

    def expire(self):
        self.server.sql(f'ALTER ROLE "{IAM}" PASSWORD \'none that anybody knows\'')
        self.server.sql(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = '{IAM}'")


@pytest.fixture
def tokens(server, tmp_path):
    """tokens(...) -> Tokens"""
    yield lambda **keys: Tokens(server, tmp_path, **keys)
    server.sql(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = '{IAM}'")


def with_tokens(proxies, server, tokens, config=None, **upstream):
    config = harness.merge({"upstream": {"passwordCommand": [str(tokens.program), "secret-argument"], **upstream}, "users": {IAM: {"password": "local"}},
                            "log": {"level": "trace"}}, config or {})
    return proxies(config, url=server.url(IAM, "x").replace(":x@", "@"), server=server)


def test_a_password_that_a_program_gives(proxies, server, tokens):
    given = tokens()
    proxy = with_tokens(proxies, server, given)
    assert given.count() == 0, "nobody has asked yet"
    clients = harness.threads(5, lambda _: proxy.connect(IAM, "local"))
    for client in clients:
        client.execute("BEGIN")
        assert client.execute("SELECT session_user").fetchone() == (IAM,)
    assert given.runs.read_text() == f"{IAM} 127.0.0.1 {server.port}\n", "one run for all of them"
    for client in clients:
        client.close()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        proxy.connect(IAM, "token-1-secret-argument")
    shown = proxy.http("/api/monitoring/config")[2] + proxy.command("check", "--config", proxy.config_file).stdout
    assert shown.count("give token") == 2
    for secret in ("secret-argument", "token-1", "local\n"):
        assert secret not in shown + proxy.log_text().replace("local\\n", ""), secret


def test_a_password_that_has_expired_is_asked_for_anew(proxies, server, tokens):
    given = tokens()
    proxy = with_tokens(proxies, server, given)
    with proxy.connect(IAM, "local") as client:
        client.execute("SELECT 1")
        for run in (2, 3):
            harness.poll(lambda: time.time() - given.runs.stat().st_mtime > 1.2, what="the password isn't quite new any more")
            given.expire()
            harness.poll(lambda: proxy.stats()["totalCount"] == 0)
            assert client.execute("SELECT 1").fetchone() == (1,), "no error reaches the client"
            assert given.count() == run
    assert proxy.stats()["perPool"][0]["lastError"] is None


def test_a_program_that_fails_is_told_with_what_it_says(proxies, server, tokens):
    given = tokens(after="echo token-in-vain; echo 'no credentials: ask the administrator' >&2; exit 7")
    proxy = with_tokens(proxies, server, given, {"pool": {"connectionTimeoutMillis": 700}})
    with pytest.raises(psycopg.OperationalError) as failed:
        proxy.connect(IAM, "local")
    said = f'passwordCommand "{given.program}" failed with exit status 7: no credentials: ask the administrator'
    assert said in str(failed.value)
    logged(proxy, said)
    assert "in-vain" not in str(failed.value) + proxy.log_text()
    assert given.count() >= 2, "it is tried again while a client waits"
    given.program.write_text(given.program.read_text().replace("echo token-in-vain;", "").replace("exit 7", ""))
    harness.poll(lambda: try_connect(proxy), what="it recovers")


def try_connect(proxy):
    try:
        proxy.connect(IAM, "local").close()
        return True
    except psycopg.OperationalError:
        return False


def test_nobody_waits_for_the_program_but_who_needs_it(proxies, server, tokens, tmp_path):
    gate = tmp_path / "gate"
    given = tokens(before=f"while ! test -e '{gate}'; do sleep 0.05; done")
    proxy = with_tokens(proxies, server, given, {
        "databases": {DATABASE: {}, OTHER_DATABASE: {"upstream": {"url": server.url(OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE)}}},
        "users": {OTHER_USER: {"password": OTHER_PASSWORD}}, "pool": {"connectionTimeoutMillis": 60000}})
    slow = threading.Thread(target=lambda: proxy.connect(IAM, "local").close(), daemon=True)
    slow.start()
    harness.poll(lambda: proxy.stats()["connectingCount"] == 1)
    with proxy.connect(OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE) as client:
        for _ in range(50):
            client.execute("SELECT 1")
            assert proxy.http("/health/live")[0] == 200
    assert slow.is_alive()
    gate.touch()
    slow.join(30)
    assert not slow.is_alive()


def test_a_program_at_work_ends_with_the_proxy(proxies, server, tokens, tmp_path):
    given = tokens(before=f"echo $$ > '{tmp_path}/pid'; exec sleep 1000")
    proxy = with_tokens(proxies, server, given)
    client = threading.Thread(target=lambda: try_connect(proxy), daemon=True)
    client.start()
    pid = harness.poll(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    assert proxy.stop() == 0
    client.join(20)
    assert not pathlib.Path(f"/proc/{pid}").exists()


# ---- the README

SECTIONS = ("In front of Neon", "In front of Supabase", "In front of RDS and Aurora", "In front of Cloud SQL")


def blocks():
    """The YAML blocks of those sections."""
    text = (harness.ROOT / "README.md").read_text()
    for title in SECTIONS:
        section = re.search(rf"^## {re.escape(title)}\n(.*?)^## ", text, re.S | re.M)
        assert section, title
        found = re.findall(r"```yaml\n(.*?)```", section[1], re.S)
        assert found, title
        for number, block in enumerate(found, 1):
            yield pytest.param(block, id=f"{title} {number}")


@pytest.mark.parametrize("block", blocks())
def test_configurations_of_the_readme(block, tmp_path, certificates):
    """As they stand there, with the files and programs that they name."""
    for file in re.findall(r"/(?:run/secrets|etc/pgsidecar)/[\w.-]+", block):
        (tmp_path / file.split("/")[-1]).write_text((certificates / "ca.crt").read_text() if file.endswith(".pem") else "secret\n")
    text = re.sub(r"/(?:run/secrets|etc/pgsidecar)/", f"{tmp_path}/", block)
    for program in ("aws", "gcloud"):
        (tmp_path / program).write_text("#!/bin/sh\necho token\n")
        (tmp_path / program).chmod(0o755)
    config = tmp_path / "pgsidecar.yaml"
    config.write_text(text)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    checked = subprocess.run([harness.BINARY, "check", "--config", config], env=environment, capture_output=True, text=True, timeout=30)
    assert checked.returncode == 0 and checked.stderr == "", checked.stderr
    assert "secret" not in checked.stdout
    assert yaml.safe_load(checked.stdout)["upstream"]["url"] in ("***", "${DATABASE_URL}")
