"""Reload: what changes at run time, by SIGHUP, by the API, by a change of the files if asked for. All of it or nothing."""
import json
import shutil
import signal
import socket
import ssl
import subprocess
import time

import harness
import wire
from harness import DATABASE, OTHER_DATABASE, OTHER_PASSWORD, OTHER_USER, PASSWORD, USER, raw


def reload(proxy, config=None, fails=None):
    """By the API; `config` is laid over what there is."""
    if config is not None:
        proxy.write_config(harness.merge(proxy.config, config))
    status, _, body = proxy.http("/api/admin/reload", method="POST")
    if fails:
        assert status == 409 and fails in json.loads(body)["error"], body
    else:
        assert status == 200, body


def server_pids(proxy):
    return sorted(server["pid"] for server in proxy.json("/api/monitoring/servers")[1]["servers"])


def certificate(proxy, ca):
    """The serial number of what it shows to clients."""
    context = ssl.create_default_context(cafile=ca)
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as plain:
        plain.sendall(wire.request(wire.SSL_REQUEST))
        assert plain.recv(1) == b"S"
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            return tls.getpeercert()["serialNumber"]


def tls_to_clients(directory):
    return {"tls": {"mode": "allow", "certificate": str(directory / "server.crt"), "key": str(directory / "server.key")}}


def put(path, text):
    """As an editor or a deployment does: a new file in place of the old one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.rename(path)


# ---- what stays and what is replaced

def test_connections_of_an_upstream_that_is_the_same_stay(proxies, pg):
    proxy = proxies({"pool": {"max": 2}, "databases": {DATABASE: {}, OTHER_DATABASE: {"upstream": {"user": OTHER_USER, "password": OTHER_PASSWORD}}}})
    with raw(proxy) as a, raw(proxy, database=OTHER_DATABASE) as b:
        a.value("SELECT 1"), b.value("SELECT 1")
        before = server_pids(proxy)
        reload(proxy, {"pool": {"max": 4, "connectionTimeoutMillis": 7000}, "log": {"level": "debug"}, "limits": {"maxClients": 50}})
        a.value("SELECT 1"), b.value("SELECT 1")
        assert server_pids(proxy) == before
        assert proxy.stats()["perPool"][0]["max"] == 4
        # One of the two is changed; a transaction on it ends where it began.
        a.ask(wire.query("BEGIN"))
        b.ask(wire.query("BEGIN"))
        changed = {OTHER_DATABASE: {"upstream": {"user": OTHER_USER, "password": OTHER_PASSWORD, "options": "-c work_mem=9MB"}}}
        reload(proxy, {"databases": {DATABASE: {}, **changed}})
        assert (a.value("SHOW work_mem"), b.value("SHOW work_mem")) == ("4MB", "4MB")
        a.ask(wire.query("COMMIT")), b.ask(wire.query("COMMIT"))
        assert (a.value("SHOW work_mem"), b.value("SHOW work_mem")) == ("4MB", "9MB")
        assert len(set(server_pids(proxy)) & set(before)) == 1


def test_another_host(proxies, pg):
    with harness.Postgres(max_connections=20) as other:
        proxy = proxies(url=pg.url(sslmode="require"))
        with raw(proxy) as w:
            w.ask(wire.query("BEGIN"))
            reload(proxy, {"upstream": {"url": other.url(sslmode="require")}})
            assert w.value("SHOW port") == str(pg.port)
            w.ask(wire.query("COMMIT"))
            assert w.value("SHOW port") == str(other.port)


def test_a_lower_max_is_kept_at_once(proxies, pg):
    proxy = proxies({"pool": {"max": 5, "idleTimeoutMillis": 0}})
    clients = [raw(proxy) for _ in range(5)]
    for w in clients:
        w.ask(wire.query("BEGIN"))
    for w in clients[:3]:
        w.ask(wire.query("COMMIT"))
    reload(proxy, {"pool": {"max": 1}})
    for w in clients[3:]:
        w.ask(wire.query("COMMIT"))
    harness.poll(lambda: pg.count(f"usename = '{USER}'") == 1, what="one is left")
    assert {w.value("SELECT 1") for w in clients} == {"1"}
    assert pg.count(f"usename = '{USER}'") == 1


def test_users_and_passwords(proxies):
    proxy = proxies({"users": {USER: {}}})
    assert wire.Wire(proxy.port).login(OTHER_USER, OTHER_PASSWORD, DATABASE).error["C"] == "28P01"
    reload(proxy, {"databases": {OTHER_DATABASE: {}, DATABASE: {}}, "users": {USER: {"password": "another"}, OTHER_USER: {"password": OTHER_PASSWORD}}})
    assert raw(proxy, OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE).value("SELECT current_user") == OTHER_USER
    assert wire.Wire(proxy.port).login(USER, PASSWORD, DATABASE).error["C"] == "28P01"


def test_a_user_that_is_named_has_the_password_of_its_name(proxies, pg):
    """And no longer the one that the server has accepted from a client."""
    pg.sql("CREATE ROLE named_later LOGIN PASSWORD 'given'")
    try:
        proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}})
        assert raw(proxy, "named_later", "given", DATABASE).value("SELECT 1") == "1"
        pg.sql("ALTER ROLE named_later PASSWORD 'configured'")
        reload(proxy, {"users": {"named_later": {"password": "configured"}}})
        assert raw(proxy, "named_later", "configured", DATABASE).value("SELECT 1") == "1"
        proxy.stop()
    finally:
        pg.sql("DROP ROLE named_later")


def test_a_rotated_password_of_the_upstream(proxies, pg, tmp_path):
    """Its connections are replaced though the configuration says the same."""
    secret = tmp_path / "secret"
    secret.write_text(PASSWORD + "\n")
    url = f"postgresql://{USER}:${{file:{secret}}}@127.0.0.1:{pg.port}/{DATABASE}?sslmode=require"
    proxy = proxies({"pool": {"max": 1}}, url=url)
    with raw(proxy) as w:
        w.value("SELECT 1")
        first = server_pids(proxy)
        reload(proxy)
        assert w.value("SELECT 1") == "1" and "nothing changed" in proxy.log_text() and server_pids(proxy) == first
        pg.sql(f"ALTER ROLE {USER} PASSWORD 'rotated'")
        try:
            put(secret, "rotated\n")
            reload(proxy)
            harness.poll(lambda: f"the file {secret} changed" in proxy.log_text())
            harness.poll(lambda: (w.value("SELECT 1"), server_pids(proxy))[1] not in ([], first), what="another connection")
            assert raw(proxy, password="rotated").value("SELECT 1") == "1"
        finally:
            pg.sql(f"ALTER ROLE {USER} PASSWORD '{PASSWORD}'")


# ---- certificates

def test_rotated_certificates(proxies, tmp_path):
    harness.make_certificates(tmp_path)
    proxy = proxies(tls_to_clients(tmp_path))
    first = certificate(proxy, tmp_path / "ca.crt")
    # The key isn't the certificate's: nothing changes.
    before = (tmp_path / "server.key").read_text()
    harness.make_certificates(tmp_path)
    after = (tmp_path / "server.key").read_text()
    put(tmp_path / "server.key", before)
    reload(proxy, {"pool": {"max": 3}}, fails="key values mismatch")
    with raw(proxy):
        assert proxy.stats()["max"] == 15
    put(tmp_path / "server.key", after)
    reload(proxy)
    assert certificate(proxy, tmp_path / "ca.crt") != first
    harness.poll(lambda: f"the file {tmp_path / 'server.crt'} changed" in proxy.log_text())


def test_an_encrypted_key_changes_nothing(proxies, tmp_path):
    harness.make_certificates(tmp_path)
    proxy = proxies(tls_to_clients(tmp_path))
    before, key = certificate(proxy, tmp_path / "ca.crt"), tmp_path / "server.key"
    subprocess.run(["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", tmp_path / "encrypted.key"], check=True, capture_output=True)
    put(key, (tmp_path / "encrypted.key").read_text())
    reload(proxy, fails=f'tls.key: "{key}" is encrypted')
    assert certificate(proxy, tmp_path / "ca.crt") == before


def test_the_upstreams_ca(proxies, pg, tmp_path):
    ca = tmp_path / "ca.crt"
    shutil.copy(pg.ca, ca)
    proxy = proxies({"pool": {"max": 1}, "upstream": {"sslrootcert": str(ca)}})
    with raw(proxy) as w:
        w.value("SELECT 1")
        first = server_pids(proxy)
        put(ca, "nonsense\n")
        reload(proxy, fails="sslrootcert")
        assert w.value("SELECT 1") == "1" and server_pids(proxy) == first
        put(ca, pg.ca.read_text())
        reload(proxy)
        harness.poll(lambda: (w.value("SELECT 1"), server_pids(proxy))[1] not in ([], first), what="a connection that was made with it")


def test_a_pool_that_is_forgotten_while_its_names_are_looked_up(proxies, pg, tmp_path):
    patience, program = tmp_path / "patience", tmp_path / "program"
    patience.write_text("0")
    program.write_text(f"#!/bin/sh\nsleep $(cat {patience})\necho '{PASSWORD}'\n")
    program.chmod(0o755)
    proxy = proxies({"databases": {"*": {}}, "auth": {"method": "trust"},
                     "upstream": {"url": pg.url(password="", sslmode="require"), "passwordCommand": [str(program)]}}, environment={"MALLOC_PERTURB_": "165"})
    with raw(proxy) as stays, wire.Wire(proxy.port) as w:
        assert w.login(USER, PASSWORD, "nowhere").error["C"] == "3D000"
        patience.write_text("3")
        reload(proxy)
        time.sleep(4)
        patience.write_text("0")
        assert stays.value("SELECT 1") == "1"


# ---- what needs a restart

def test_an_address_is_used_until_the_restart(proxies):
    proxy = proxies()
    told = "reload: listen changed, which needs a restart"
    for times in (1, 2):
        reload(proxy, {"listen": "127.0.0.1:1"})
        harness.poll(lambda: proxy.log_text().count(told) == times, what="it is told at each reload")
        assert f"listen: 127.0.0.1:{proxy.port}\n" in proxy.json("/api/monitoring/config")[1]["yaml"]
    reload(proxy, {"listen": f"127.0.0.1:{proxy.port}"})
    harness.poll(lambda: "reload: nothing changed" in proxy.log_text(), what="back to what is in use")


# ---- admin and log

def test_admin_and_log(proxies, tmp_path):
    proxy = proxies()
    rebound = {"Host": "rebound.example.com"}
    assert proxy.http("/api/admin/reload", "POST", rebound)[0] == 403
    assert proxy.http("/quitquitquit", "POST")[0] == 404
    reload(proxy, {"admin": {"hosts": ["rebound.example.com"], "quitquitquit": True}, "log": {"format": "json"}})
    assert proxy.http("/api/admin/reload", "POST", rebound)[0] == 200
    harness.poll(lambda: json.loads(proxy.log_text().splitlines()[-1])["event"] == "reload", what="the log is JSON")
    assert proxy.http("/quitquitquit", "POST")[0] == 200
    assert proxy.wait_exit(10) == 0


# ---- by itself

def mount(directory, version, files):
    """As Kubernetes mounts a ConfigMap or a Secret: name -> ..data/name, ..data -> a directory of its own for each version."""
    (directory / version).mkdir()
    for name, text in files.items():
        (directory / version / name).write_text(text)
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(f"..data/{name}")
    (directory / "..new").symlink_to(version)
    (directory / "..new").rename(directory / "..data")


def test_a_change_of_the_file_is_a_reload_if_asked_for(proxies):
    proxy = proxies()
    put(proxy.config_file, json.dumps(harness.merge(proxy.config, {"watchConfig": True, "pool": {"max": 6}})))
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        assert proxy.stats()["max"] == 15, "it wasn't asked for"
        proxy.signal(signal.SIGHUP)
        harness.poll(lambda: proxy.stats()["max"] == 6, what="the reload")
        put(proxy.config_file, json.dumps(harness.merge(proxy.config, {"watchConfig": True, "pool": {"max": 7}})))
        harness.poll(lambda: proxy.stats()["max"] == 7, what="the change of the file counts")
        put(proxy.config_file, "pool: {max: many}\n")
        harness.poll(lambda: "nothing is changed: " in proxy.log_text(), what="the mistake is told")
        assert proxy.stats()["max"] == 7
        # Written in place, as an editor may.
        proxy.config_file.write_text(json.dumps(harness.merge(proxy.config, {"watchConfig": True, "pool": {"max": 8}})))
        harness.poll(lambda: proxy.stats()["max"] == 8, what="it counts again")
        put(proxy.config_file, json.dumps(harness.merge(proxy.config, {"pool": {"max": 9}})))
        harness.poll(lambda: proxy.stats()["max"] == 9, what="the last one")
        put(proxy.config_file, json.dumps(harness.merge(proxy.config, {"pool": {"max": 10}})))
        assert w.value("SELECT 1") == "1" and proxy.stats()["max"] == 9


def test_each_mistake_is_an_event(proxies):
    proxy = proxies()
    put(proxy.config_file, "pool: {max: many}\nlog: {level: loud}\nupstream: {host: h}\n")
    proxy.signal(signal.SIGHUP)
    lines = harness.poll(lambda: [line for line in proxy.log_text().splitlines() if "[reload_failed]" in line], what="the mistakes are told")
    assert [line.split("pgsidecar.yaml", 1)[1][:14] for line in lines] == [":1: pool.max: ", ":2: log.level:"], lines


def test_a_passfile_counts_as_a_file_of_the_configuration(proxies, pg, tmp_path):
    def write(password):
        (tmp_path / "passfile.new").write_text(f"*:*:*:*:{password}\n")
        (tmp_path / "passfile.new").chmod(0o600)
        (tmp_path / "passfile.new").rename(tmp_path / "passfile")

    write(OTHER_PASSWORD)
    url = f"postgresql://{OTHER_USER}@127.0.0.1:{pg.port}/{OTHER_DATABASE}?sslmode=require&passfile={tmp_path / 'passfile'}"
    told = f"the file {tmp_path / 'passfile'} changed"
    for watch in (False, True):
        proxy = proxies({"watchConfig": watch, "pool": {"max": 1}, "users": {OTHER_USER: {"password": "here"}}}, url=url)
        with raw(proxy, OTHER_USER, "here", OTHER_DATABASE) as w:
            assert w.value("SELECT 1") == "1"
            [first] = server_pids(proxy)
            pg.sql(f"ALTER ROLE {OTHER_USER} PASSWORD 'rotated'")
            try:
                write("rotated")
                if not watch:
                    reload(proxy)
                harness.poll(lambda: told in proxy.log_text(), what="it is noticed")
                harness.poll(lambda: (w.value("SELECT 1"), server_pids(proxy))[1] not in ([], [first]), what="another connection")
            finally:
                pg.sql(f"ALTER ROLE {OTHER_USER} PASSWORD '{OTHER_PASSWORD}'")
                write(OTHER_PASSWORD)
        assert "nothing changed" not in proxy.log_text()


def test_a_directory_of_the_configuration_is_watched(proxies, pg, tmp_path):
    (tmp_path / "crls").mkdir()
    proxy = proxies({"watchConfig": True}, url=pg.url() + f"&sslcrldir={tmp_path / 'crls'}")
    (tmp_path / "crls" / "00000000.r0").write_text("")
    harness.poll(lambda: f"the file {tmp_path / 'crls'} changed" in proxy.log_text(), what="it is noticed")


def test_files_that_are_mounted_anew(proxies, pg, tmp_path):
    made = tmp_path / "made"
    made.mkdir()

    def mounted(version, secret):
        harness.make_certificates(made)
        mount(tmp_path, version, {"secret": secret, **{name: (made / name).read_text() for name in ("server.crt", "server.key")}})

    mounted("..1", PASSWORD)
    url = f"postgresql://{USER}:${{file:{tmp_path / 'secret'}}}@127.0.0.1:{pg.port}/{DATABASE}?sslmode=require"
    proxy = proxies({"watchConfig": True, "pool": {"max": 1}, **tls_to_clients(tmp_path)}, url=url)
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        (first,), shown = server_pids(proxy), certificate(proxy, made / "ca.crt")
        mounted("..2", PASSWORD)
        harness.poll(lambda: f"the file {tmp_path / 'server.crt'} changed" in proxy.log_text(), what="it is noticed")
        assert certificate(proxy, made / "ca.crt") != shown
        assert w.value("SELECT 1") == "1" and server_pids(proxy) == [first], "the password is the same"
        pg.sql(f"ALTER ROLE {USER} PASSWORD 'rotated'")
        try:
            mounted("..3", "rotated")
            harness.poll(lambda: (w.value("SELECT 1"), server_pids(proxy))[1] not in ([], [first]), what="another connection")
            assert raw(proxy, password="rotated").value("SELECT 1") == "1"
        finally:
            pg.sql(f"ALTER ROLE {USER} PASSWORD '{PASSWORD}'")
