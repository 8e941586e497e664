"""The README's section "Troubleshoot": its lines, as they stand there, are run against a proxy in that state and show what it says."""
import json
import re
import signal
import subprocess
import threading

import psycopg
import pytest

import harness
from harness import poll

SECTION = re.search(r"^## Troubleshoot\n(.*?)^## ", (harness.ROOT / "README.md").read_text(), re.M | re.S)[1]
SYMPTOMS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", SECTION, re.M | re.S))


def ask(proxy, symptom, directory="/"):
    """What the symptom's lines print, each."""
    lines = re.search(r"```sh\n(.*?)```", SYMPTOMS[symptom], re.S)[1].splitlines()
    answers = []
    for line in lines:
        line = line.replace("127.0.0.1:5000", f"127.0.0.1:{proxy.admin_port}").replace("-p 6432", f"-p {proxy.port}")
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], env=proxy.environment(), cwd=directory, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and not done.stderr, f"{line}\n{done.stdout}{done.stderr}"
        answers.append(done.stdout)
    return answers


def table(answer):
    return [line.split("\t") for line in answer.splitlines()]


def in_background(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_my_queries_wait(proxies):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 60000}})
    with proxy.connect(application_name="worker", autocommit=False) as leaky, proxy.connect(application_name="report") as slow, proxy.connect() as third:
        leaky.execute("SELECT 1")

        def sleep():
            with pytest.raises(psycopg.errors.QueryCanceled):
                slow.execute("SELECT pg_sleep(60)")
        threads = [in_background(sleep)]
        poll(lambda: proxy.stats()["activeCount"] == 2)
        threads.append(in_background(lambda: third.execute("SELECT 2")))
        poll(lambda: proxy.stats()["waitingCount"] == 1)
        pools, servers = ask(proxy, "My queries wait")
        pool = json.loads(pools)
        assert (pool["waitingCount"], pool["activeCount"], pool["max"], pool["paused"], pool["lastError"]) == (1, 2, 2, False, None)
        held = {row[3]: row for row in table(servers)}
        assert held["worker"][0] == "idle in transaction" and held["report"][0] == "active"
        assert held["report"][4] == "SELECT pg_sleep(?)" and float(held["worker"][1]) > 0
        proxy.http(f"/api/admin/clients/{held['report'][2]}/cancel", method="POST")  # as it says
        leaky.commit()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


def test_queries_are_slow(proxy):
    with proxy.connect() as client:
        for _ in range(3):
            client.execute("SELECT pg_sleep(0.1)")
        queries, profile = ask(proxy, "Queries are slow")
        calls, mean, wait, server, reading, statement = table(queries)[0]
        assert (calls, statement) == ("3", "SELECT pg_sleep(?)")
        assert float(server) >= 300 > 0 <= float(wait) and float(mean) >= 100 and float(reading) < float(server)
        assert set(json.loads(profile)["loops"]["data"]) >= {"utilization", "lagMs", "preemptionsPerSecond"}


def test_cpu_is_high(proxy, tmp_path):
    load = subprocess.Popen(["pgbench", "-n", "-f", "-", "-c", "4", "-T", "60"], env=proxy.environment(), stdin=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    load.stdin.write(b"SELECT 1;\n")
    load.stdin.close()
    try:
        poll(lambda: proxy.stats()["query"]["count"] > 1000, 60)
        profile, _ = ask(proxy, "CPU is high", tmp_path)
        loops, phases, handshakes = (json.loads(line) for line in profile.splitlines())
        assert loops["perTransaction"]["cpuMicros"] > 0 and loops["loops"]["data"]["utilization"] > 0
        assert set(phases) == {"decide", "receive", "send", "tls", "wait"} and set(handshakes) == {"clients", "servers"}
        stacks = (tmp_path / "stacks.txt").read_text().splitlines()
        assert stacks and all(re.fullmatch(r"(data|control);.* \d+", line) for line in stacks)
    finally:
        load.kill()
        load.wait()


def test_memory_grows(proxy):
    memory = json.loads(ask(proxy, "Memory grows")[0])
    told = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in SYMPTOMS["Memory grows"].splitlines() if line.startswith("| `")))
    assert set(told) == {*memory["owners"], "freeBytes"}


def test_a_client_gets_53300(proxies):
    proxy = proxies({"limits": {"maxClients": 1}})
    with proxy.connect() as client:
        client.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError, match="sorry, too many clients already"):
            proxy.connect()
        clients, server = (json.loads(answer) for answer in ask(proxy, "A client gets 53300"))
        assert (clients["clients"]["total"], clients["clients"]["max"], clients["timeouts"]) == (1, 1, [0])
        assert server["maxConnections"] == 100 and server["usedByUs"] >= 1


def test_a_connection_is_kept(proxies):
    proxy = proxies({"admin": {"users": ["app"]}})
    with proxy.connect(application_name="report") as client:
        client.execute("CREATE TEMP TABLE rows_of_mine ()")
        poll(lambda: proxy.json("/api/monitoring/pins")[1]["pins"])
        pins, console = ask(proxy, "A connection is kept")
        _, application, _, statement, detail, ends = table(pins)[0]
        assert application == "report" and statement.startswith("CREATE TEMP TABLE") and "rows_of_mine" in detail and "DROP" in ends
        assert "temporary_object" in console


def test_the_database_is_away(proxies):
    with harness.Postgres() as server:
        proxy = proxies({"pool": {"connectionTimeoutMillis": 500}}, server=server)
        server.stop()
        with pytest.raises(psycopg.Error), proxy.connect() as client:
            client.execute("SELECT 1")
        for answer in ask(proxy, "The database is away"):
            document = json.loads(answer)
            database = document.get("database", document)
            assert database["status"] == "down" and "Connection refused" in database["error"]
        server.start()
        with proxy.connect() as client:
            client.execute("SELECT 1")


def test_shutdown_hangs(proxy):
    client = proxy.connect(application_name="worker")
    client.execute("BEGIN")
    client.execute("SELECT 1")
    proxy.signal(signal.SIGTERM)
    poll(lambda: "draining" in proxy.log_text())
    health, clients = ask(proxy, "Shutdown hangs")
    assert json.loads(health) == {"draining": True, "active": 1}
    [[number, application, state, seconds, statement]] = table(clients)
    assert (application, state, statement) == ("worker", "idle in transaction", "SELECT ?") and float(seconds) > 0
    proxy.http(f"/api/admin/clients/{number}/close", method="POST")  # as it says
    assert proxy.wait_exit(20) == 0
    client.close()
