"""Signals, subcommands, configuration mistakes, the end."""
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request

import pytest
import yaml

import harness
import wire
from harness import DATABASE, PASSWORD, USER, curl, raw


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_finishes_what_is_active(proxies, pg, number):
    proxy = proxies()
    busy, idle = raw(proxy), raw(proxy)
    busy.ask(wire.query("BEGIN"))
    assert idle.value("SELECT 1") == "1"
    proxy.signal(number)
    told = idle.closed()
    assert [m.error["C"] for m in told if m.type == "E"] == ["57P01"]
    assert curl(proxy, "/health/ready")[0] == 503
    assert curl(proxy, "/health/live")[0] == 200
    try:
        with wire.Wire(proxy.port, timeout=5) as late:
            assert late.login(USER, PASSWORD, DATABASE).error["C"] in ("57P03", "57P01")
    except (OSError, wire.Closed):
        pass
    assert busy.value("SELECT 'still here'") == "still here"
    assert busy.ask(wire.query("COMMIT"))[-1].type == "Z"
    before = time.monotonic()
    assert proxy.wait_exit(10) == 0
    assert time.monotonic() - before < 2
    harness.poll(lambda: pg.count("usename = 'app'") == 0, what="server connections are closed")


def test_without_clients_it_exits_at_once(proxies):
    proxy = proxies()
    with raw(proxy) as w:
        w.value("SELECT 1")
    harness.poll(lambda: "clients" and proxy.stats()["activeCount"] == 0, what="idle")
    before = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - before < (5 if harness.sanitized() else 1)


def test_second_signal_ends_at_once(proxies):
    proxy = proxies()
    proxy.expect_exit = 3
    with raw(proxy) as busy:
        busy.ask(wire.query("BEGIN"))
        proxy.signal(signal.SIGTERM)
        harness.poll(lambda: curl(proxy, "/health/ready")[0] == 503, what="it drains")
        proxy.signal(signal.SIGTERM)
        assert proxy.wait_exit(5) == 3


def test_signals_that_pgbouncers_operators_send(proxies):
    proxy = proxies()
    proxy.expect_exit = 3
    with raw(proxy) as client:
        proxy.signal(signal.SIGUSR1)
        harness.poll(lambda: "SIGUSR1" in proxy.log_text(), what="it is told that nothing comes of it")
        assert client.value("SELECT 1") == "1"
        client.ask(wire.query("BEGIN"))
        proxy.signal(signal.SIGQUIT)
        assert proxy.wait_exit(5) == 3
        assert "SIGQUIT: ending at once" in proxy.log_text()


def test_end_of_the_drain_is_forced(proxies, pg):
    proxy = proxies({"shutdown": {"timeoutMillis": 700}})
    proxy.expect_exit = 3
    with raw(proxy) as busy:
        busy.send(wire.query("SELECT pg_sleep(60)"))
        harness.poll(lambda: pg.count("query LIKE '%%pg_sleep(60)%%' AND state = 'active'"), what="it runs")
        proxy.signal(signal.SIGTERM)
        assert proxy.wait_exit(10) == 3
        assert [m for m in busy.closed() if m.type == "E"]
    harness.poll(lambda: pg.count("query LIKE '%%pg_sleep(60)%%' AND state = 'active'") == 0, what="the query was cancelled")


def test_a_drain_ends_who_is_in_its_tls_handshake(proxies, tmp_path):
    harness.make_certificates(tmp_path)
    proxy = proxies({"tls": {"mode": "allow", "certificate": str(tmp_path / "server.crt"), "key": str(tmp_path / "server.key")}})
    with raw(proxy) as busy, wire.Wire(proxy.port, timeout=3) as shaking:
        busy.ask(wire.query("BEGIN"))
        shaking.send(wire.request(wire.SSL_REQUEST))
        assert shaking.bytes(1) == b"S"
        before = proxy.cpu_seconds()
        proxy.signal(signal.SIGTERM)
        assert shaking.closed() == []
        assert proxy.cpu_seconds() - before < 0.5
        busy.ask(wire.query("COMMIT"))
    assert proxy.wait_exit(10) == 0


def test_post_drain(proxies):
    proxy = proxies()
    assert curl(proxy, "/api/admin/drain", "-X", "POST")[0] == 200
    assert proxy.wait_exit(10) == 0


def test_quitquitquit_and_shutdown(proxies):
    for how in ("curl", "shutdown"):
        proxy = proxies({"admin": {"quitquitquit": True}})
        if how == "curl":
            assert curl(proxy, "/quitquitquit", "-X", "POST")[0] == 200
        else:
            done = proxy.command("shutdown", "--config", str(proxy.config_file))
            assert done.returncode == 0, done.stderr
        assert proxy.wait_exit(10) == 0


def test_reload(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 1000}})
    with raw(proxy) as a, raw(proxy) as b:
        a.ask(wire.query("BEGIN"))
        assert b.ask(wire.query("SELECT 1"))[0].type == "E"
        proxy.write_config(harness.merge(proxy.config, {"pool": {"max": 2}}))
        proxy.signal(signal.SIGHUP)
        harness.poll(lambda: proxy.stats()["max"] == 2, what="the new max counts")
        assert b.value("SELECT 2") == "2"
        a.ask(wire.query("ROLLBACK"))
        # A bad file changes nothing.
        good = proxy.config_file.read_text()
        proxy.config_file.write_text("pool: {max: many, nosuchkey: 1}\n")
        proxy.signal(signal.SIGHUP)
        harness.poll(lambda: "nosuchkey" in proxy.log_text(), what="the log names the mistake")
        assert proxy.stats()["max"] == 2
        assert a.value("SELECT 3") == "3"
        proxy.config_file.write_text(good)


def test_version_and_help(proxy):
    done = proxy.command("--version")
    assert done.returncode == 0 and re.fullmatch(r"pgsidecar \d+\.\d+\.\d+\n", done.stdout)
    done = proxy.command("--help")
    assert done.returncode == 0
    for word in ("check", "healthcheck", "wait", "shutdown", "--config"):
        assert word in done.stdout
    for arguments in (("shutdown", "--max", "1s"), ("check", "--started")):
        done = proxy.command(*arguments)
        assert done.returncode == 2 and "are for wait" in done.stderr


def test_closed_standard_streams_are_no_sockets(pg):
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": pg.url(), "PGSIDECAR_LISTEN": f"127.0.0.1:{harness.free_port()}", "PGSIDECAR_ADMIN_LISTEN": "off"}
    process = subprocess.Popen(["sh", "-c", "exec 0>&- 1>&- 2>&-; exec \"$0\"", harness.BINARY], env=environment)
    try:
        harness.poll(lambda: harness.open_files(process.pid) > 5, what="it runs")
        assert {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    finally:
        process.terminate()
        assert process.wait(10) == 0


def test_check_prints_the_configuration_without_secrets(proxy):
    done = proxy.command("check", "--config", str(proxy.config_file))
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["pool"]["max"] == 15 and shown["limits"]["maxClients"] == 1000
    for secret in (PASSWORD, harness.percent(PASSWORD)):
        assert secret not in done.stdout + done.stderr + proxy.log_text()


def test_check_tells_every_mistake_with_its_line(proxy, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("upstream: {url: postgresql://u:hidden@h/d}\npool:\n  max: -3\n  idleTimeoutMilis: 5\nlog: {level: loud}\n")
    done = proxy.command("check", "--config", str(file))
    assert done.returncode == 2
    assert re.search(r"bad\.yaml:3\b", done.stderr), done.stderr
    assert re.search(r"bad\.yaml:4\b.*idleTimeoutMillis", done.stderr), done.stderr
    assert re.search(r"bad\.yaml:5\b", done.stderr), done.stderr
    assert "hidden" not in done.stderr + done.stdout


def test_check_finds_what_a_start_would(proxy, tmp_path):
    (tmp_path / "garbage.pem").write_text("garbage\n")
    file, garbage = tmp_path / "bad.yaml", tmp_path / "garbage.pem"
    url = "upstream: {url: postgresql://u:hidden@h/d}\n"
    for text, says in ((f"upstream: {{url: postgresql://u:hidden@h/d, sslrootcert: {garbage}}}\n", r"bad.yaml:1: upstream\.sslrootcert: .*garbage.pem"),
                       (url + f"databases: {{r: {{upstream: {{sslrootcert: {garbage}}}}}}}\n", r"bad.yaml:2: databases\.r\.upstream\.sslrootcert: .*garbage.pem"),
                       (f"upstream: {{url: 'postgresql://h/d?sslrootcert={garbage}'}}\npool: {{max: x}}\n", r"bad.yaml:1: upstream\.url: .*garbage.pem"),
                       (f"upstream: {{url: postgresql://h/d, sslcrl: {garbage}, sslrootcert: {harness.ROOT}/README.md}}\n", r"upstream\.sslrootcert: .*README"),
                       (url + f"tls:\n  mode: allow\n  certificate: {garbage}\n  key: {garbage}\n", r"bad.yaml:4: tls\.certificate: .*garbage.pem"),
                       (url + f"tls: {{mode: allow, certificate: {garbage}, key: {garbage}}}\npool: {{max: x}}\n", r"pool.max: (.|\n)*:2: tls\.certificate: .*garbage.pem"),
                       (url + "databases:\n  r: {upstream: {dbname: x, sslmode: foo}}\n", r"bad.yaml:\d: databases\.r\..*foo"),
                       (url + "databases: {r: {upstream: {password: '${file:/nope}'}}}\n", r"databases\.r\..*/nope")):
        file.write_text(text)
        for command in (("check",), ()):
            done = subprocess.run([proxy.binary, *command, "--config", file], capture_output=True, text=True, timeout=20, env={"PATH": os.environ["PATH"]})
            assert done.returncode == 2 and re.search(says, done.stderr), (text, command, done.stderr)
            assert "hidden" not in done.stderr


def test_no_configuration_at_all(proxy):
    done = subprocess.run([proxy.binary], capture_output=True, text=True, timeout=20, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2 and "DATABASE_URL" in done.stderr


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_an_empty_url_is_none(proxy, empty):
    for environment in ({"DATABASE_URL": empty}, {"DATABASE_URL": empty, "PGSIDECAR_UPSTREAM_URL": empty}):
        done = subprocess.run([proxy.binary], capture_output=True, text=True, timeout=20, env={"PATH": os.environ["PATH"], **environment})
        assert done.returncode == 2 and "no database to connect to: set DATABASE_URL" in done.stderr, done


def test_an_empty_name_of_the_file_is_none(proxy):
    for arguments in (("check", "--config", ""), ("check", "--config=")):
        done = proxy.command(*arguments)
        assert done.returncode == 2 and "--config needs a file" in done.stderr, done


@pytest.mark.parametrize("host, shown", [("[::1]", "[::1]"), ("*", "[::]"), ("*", "0.0.0.0")])
def test_the_admin_port_is_told_as_a_url(proxies, host, shown):
    port = harness.free_port()
    proxy = proxies({"admin": {"listen": f"{host}:{port}"}}, wait=False)
    harness.poll(lambda: f"admin at http://{shown}:{port}\n" in proxy.log_text(), what="it says so")


def test_environment_alone(pg, proxies):
    port, admin = harness.free_port(), harness.free_port()
    environment = {"DATABASE_URL": pg.url(), "PGSIDECAR_LISTEN": f"127.0.0.1:{port}", "PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{admin}", "PGSIDECAR_POOL_MAX": "4"}
    process = subprocess.Popen([harness.BINARY], env={"PATH": os.environ["PATH"], **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        def works():
            assert process.poll() is None
            try:
                with wire.Wire(port) as w:
                    return w.login(USER, PASSWORD, DATABASE) is None and w.value("SELECT 1") == "1"
            except (OSError, wire.Closed):
                return False
        harness.poll(works, what="it serves")
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_healthcheck_and_wait(proxies, pg):
    proxy = proxies()
    file = ("--config", str(proxy.config_file))
    assert proxy.command("healthcheck", *file).returncode == 0
    assert proxy.command("wait", "--max", "5s", *file).returncode == 0
    assert proxy.stop() == 0
    assert proxy.command("healthcheck", *file).returncode == 1
    assert proxy.command("wait", "--max", "300ms", *file).returncode == 1


@pytest.mark.parametrize("what", ["listen", "admin"])
def test_port_in_use_names_the_key(proxies, pg, what):
    proxy = proxies()
    config = harness.merge(proxy.config, {"listen": [f"127.0.0.1:{proxy.port if what == 'listen' else harness.free_port()}"],
                                          "admin": {"listen": f"127.0.0.1:{proxy.admin_port if what == 'admin' else harness.free_port()}"}})
    other = proxy.directory / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    done = proxy.command("run", "--config", str(other))
    assert done.returncode == 1
    assert ("admin.listen" if what == "admin" else "listen") in done.stderr + done.stdout


def test_idle_costs_nothing(proxies, pg):
    if harness.sanitized():
        pytest.skip("a sanitizer has a thread of its own")
    proxy = proxies()
    clients = [raw(proxy) for _ in range(20)]
    for w in clients:
        w.value("SELECT 1")
    time.sleep(2.5)  # the last sample has been taken
    before, cpu = proxy.switches(), proxy.cpu_seconds()
    threading.Event().wait(3)
    assert proxy.switches() - before <= 1
    assert proxy.cpu_seconds() - cpu < 0.001
    for w in clients:
        w.sock.close()


def test_exit_on_idle_waits_for_a_client_and_its_end(proxies):
    proxy = proxies({"pool": {"allowExitOnIdle": True, "idleTimeoutMillis": 300}})
    with socket.create_connection(("127.0.0.1", proxy.port)):  # a port probe isn't a client
        pass
    with pytest.raises(subprocess.TimeoutExpired):
        proxy.wait_exit(0.7)
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        with pytest.raises(subprocess.TimeoutExpired):
            proxy.wait_exit(0.7)
    assert proxy.wait_exit(5) == 0


def test_accepts_while_draining_if_told_to(proxies):
    proxy = proxies({"shutdown": {"acceptWhileDraining": True}})
    with raw(proxy) as w:
        proxy.signal(signal.SIGTERM)
        harness.poll(lambda: curl(proxy, "/health/ready")[0] == 503, what="it drains")
        with raw(proxy) as late:
            assert (late.value("SELECT 1"), w.value("SELECT 2")) == ("1", "2")
    assert proxy.wait_exit(10) == 0


def test_who_says_nothing_holds_no_drain_back(proxies):
    proxy = proxies({"shutdown": {"acceptWhileDraining": True}})
    with wire.Wire(proxy.port), raw(proxy) as w:
        proxy.signal(signal.SIGTERM)
        harness.poll(lambda: curl(proxy, "/health/ready")[0] == 503, what="it drains")
        assert w.value("SELECT 1") == "1"
        w.sock.close()
        assert proxy.wait_exit(5) == 0


def test_its_memory_is_for_nobody_else(pg):
    """It holds passwords: neither a core dump nor another process of its user gets them. It reads of itself what it needs."""
    if os.getuid() != 0:
        pytest.skip("whose files these are shows only if it is another's process")
    admin = harness.free_port()
    process = subprocess.Popen([harness.BINARY], stdout=subprocess.DEVNULL, cwd="/", **harness.unprivileged(),
                               env={"DATABASE_URL": pg.url(sslmode="require"), "PGSIDECAR_LISTEN": f"127.0.0.1:{harness.free_port()}",
                                    "PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{admin}"})
    try:
        harness.poll(lambda: socket.socket().connect_ex(("127.0.0.1", admin)) == 0, what="it listens")
        assert os.stat(f"/proc/{process.pid}/mem").st_uid == 0
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics").read().decode()
        assert float(re.search(r"^process_open_fds (\S+)", metrics, re.M)[1]) > 5
        assert float(re.search(r"^process_resident_memory_bytes (\S+)", metrics, re.M)[1]) > 1e6
    finally:
        process.terminate()
        assert process.wait(10) == 0


def test_reload_while_draining(proxies):
    proxy = proxies()
    with raw(proxy) as w:
        w.ask(wire.query("BEGIN"))
        proxy.signal(signal.SIGINT)
        harness.poll(lambda: curl(proxy, "/health/ready")[0] == 503, what="it drains")
        proxy.signal(signal.SIGHUP)
        harness.poll(lambda: "reload" in proxy.log_text(), what="it reloads")
        assert w.value("SELECT 1") == "1"
        w.ask(wire.query("COMMIT"))
    assert proxy.wait_exit(10) == 0


def test_reload_names_what_needs_a_restart(proxies):
    proxy = proxies()
    proxy.write_config(harness.merge(proxy.config, {"listen": ["127.0.0.1:1"], "admin": {"listen": "127.0.0.1:2"}, "limits": {"maxClients": 7}}))
    status, body = curl(proxy, "/api/admin/reload", "-X", "POST")
    restart = " changed, which needs a restart"
    assert status == 200 and json.loads(body)["changes"] == ["limits.maxClients changed", "listen" + restart, "admin.listen" + restart], body
    harness.poll(lambda: "limits.maxClients changed" in proxy.log_text(), what="it is told")
    for key in ("listen", "admin.listen"):
        harness.poll(lambda: f"reload: {key} changed, which needs a restart" in proxy.log_text(), what=key)
    proxy.config_file.write_text("pool: {max: many}\n")
    status, body = curl(proxy, "/api/admin/reload", "-X", "POST")
    assert status == 409 and "pool.max" in json.loads(body)["error"]


def test_reload_turns_tls_off(proxies, tmp_path):
    harness.make_certificates(tmp_path)
    proxy = proxies({"tls": {"mode": "allow", "certificate": str(tmp_path / "server.crt"), "key": str(tmp_path / "server.key")}})
    proxy.write_config(dict(proxy.config, tls={"mode": "disable"}))
    assert curl(proxy, "/api/admin/reload", "-X", "POST")[0] == 200
    with raw(proxy) as w:  # the data loop has it by now
        assert w.value("SELECT 1") == "1"
    with wire.Wire(proxy.port) as w:
        w.send(wire.request(wire.SSL_REQUEST))
        assert w.bytes(1) == b"N"


def test_exit_codes_of_commands(proxies):
    off = proxies({"admin": {"listen": "off"}}, wait=False)
    harness.poll(lambda: "listening" in off.log_text(), what="it listens")
    file = ("--config", str(off.config_file))
    for arguments, code, says in ((("frob",), 2, "frob"), (("run", "extra"), 2, "extra"), (("--config",), 2, "--config"), (("wait", "--max", "x"), 2, "--max"),
                                  (("check", "--config", "/no/such"), 2, "/no/such"), (("check", "--config", "/tmp"), 2, "/tmp"),
                                  (("healthcheck", *file), 1, "admin.listen"), (("shutdown", *file), 1, "admin.listen"), (("wait", "--max=0", *file), 1, "off")):
        done = off.command(*arguments)
        assert done.returncode == code and says in done.stderr, (arguments, done)


def test_every_key_is_a_variable(proxy):
    """Each key of the example, given another value by its variable, is that in what check prints."""
    example = yaml.safe_load((harness.ROOT / "conf/pgsidecar.yaml").read_text())
    given = {"listen": "127.0.0.1:7001", "pool.mode": "session", "pool.residueCheck": "always", "pool.onUnsupported": "error", "auth.method": "md5", "admin.listen": "127.0.0.1:7002",
             "admin.tokenFile": "/dev/null", "admin.hosts": "a,b", "admin.users": "a,b", "admin.statsUsers": "c", "log.level": "debug", "log.format": "json", "pool.min": "1"}
    for section in ("pool", "limits", "admin", "metrics", "alerts", "shutdown"):
        for key, default in example[section].items():
            if f"{section}.{key}" not in given:
                given[f"{section}.{key}"] = str(not default).lower() if isinstance(default, bool) else str(default + 1)
    given |= {f"upstream.{key}": str(default + 1) for key, default in example["upstream"].items() if key != "url"}
    assert len(given) > 24

    def variable(path):
        return "PGSIDECAR_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path.replace(".", "_")).upper()

    done = proxy.command("check", environment={"DATABASE_URL": "postgresql://u@h/d", **{variable(path): value for path, value in given.items()}})
    assert done.returncode == 0, done.stderr
    shown = yaml.load(done.stdout, Loader=yaml.BaseLoader)
    for path, value in given.items():
        section, _, key = path.partition(".")
        assert (shown[section][key] if key else shown[section]) == value, path


@pytest.mark.parametrize("url", ["postgresql+asyncpg://app:hidden@h/d?ssl=require", "postgresql://app:hidden/x@h/d", "//app:hidden@h/d?x=1", "host=h password=a hidden=b"])
def test_no_mistake_tells_a_secret(proxy, url):
    for command in ("check", "run"):
        done = proxy.command(command, environment={"DATABASE_URL": url})
        assert done.returncode == 2 and done.stderr and "hidden" not in done.stderr + done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["postgresql://app:hidden@h/d"], ["check", "host=h password=hidden"], ["--url=postgres://app:hidden@h/d"],
                                       ["check", "--config", "postgresql://app:hidden@h/d"]])
def test_a_connection_string_as_an_argument(proxy, arguments):
    done = proxy.command(*arguments)
    assert done.returncode == 2 and "DATABASE_URL" in done.stderr and "hidden" not in done.stderr + done.stdout, done.stderr


def test_healthcheck_needs_no_secret(proxies, pg, tmp_path):
    """A liveness probe while a secret is being replaced must not end the pod."""
    secret = tmp_path / "password"
    secret.write_text(PASSWORD)
    proxy = proxies({"upstream": {"url": pg.url(), "password": "${file:%s}" % secret}})
    secret.unlink()
    done = proxy.command("healthcheck", "--config", str(proxy.config_file))
    assert done.returncode == 0, done.stderr
