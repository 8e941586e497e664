"""The server's side: what a connection string says, and how pgsidecar logs in."""
import base64
import contextlib
import functools
import hashlib
import hmac
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time

import pytest

import harness
import wire
from gate import Gate, Listening
from harness import DATABASE, OTHER_DATABASE, OTHER_PASSWORD, OTHER_USER, PASSWORD, USER

HOW = ("SELECT concat_ws(' ', ssl, version, client_dn, nullif(current_setting('application_name'), ''), current_setting('work_mem')) "
       "FROM pg_stat_ssl WHERE pid = pg_backend_pid()")


@pytest.fixture
def through(proxies, pg):
    """through(upstream, ...) -> what HOW answers, or the (SQLSTATE, text) of the login that failed. The client's password is right."""

    def answer(upstream, user=USER, password=PASSWORD, database=DATABASE, wait=1000, **keys):
        proxy = proxies({"upstream": upstream, "users": {user: {"password": password}}, "pool": {"connectionTimeoutMillis": wait}},
                        url=upstream.get("url", ""), **keys)
        with wire.Wire(proxy.port) as w:
            failure = w.login(user, password, database)
            return (failure.error["C"], failure.error["M"]) if failure else w.value(HOW)

    return answer


@contextlib.contextmanager
def hba(pg, *lines):
    """These lines before the server's own ones."""
    file = pg.data / "pg_hba.conf"
    before = file.read_text()

    def put(text):
        loaded = pg.sql("SELECT pg_conf_load_time()")
        file.write_text(text)
        pg.sql("SELECT pg_reload_conf()")
        # The postmaster reads pg_hba.conf after the settings, whose time a new backend has from it.
        harness.poll(lambda: pg.sql("SELECT pg_conf_load_time()") != loaded, what="the server has read the file")

    put("\n".join(lines) + "\n" + before)
    try:
        yield
    finally:
        put(before)


def url(pg, query="", user=USER, password=PASSWORD, host="127.0.0.1", port=None, database=DATABASE):
    secret = "" if password is None else ":" + harness.percent(password)
    return {"url": f"postgresql://{user}{secret}@{host}:{port or pg.port}/{database}?{query}"}


def test_prefer_tells_a_refusal_once(through, pg):
    assert through(url(pg, "sslmode=prefer", password="wrong"))[1].count("password authentication failed") == 1
    with hba(pg, f"host all {USER} 127.0.0.1/32 reject"):
        assert through(url(pg, "sslmode=prefer"))[1].count("rejects connection") == 1


# ---- sslmode, methods

@pytest.mark.parametrize("rules,mode,says", [
    ("host", "disable", "f 4MB"), ("host", "allow", "f 4MB"), ("host", "prefer", "t TLS"), ("host", "require", "t TLS"),
    ("hostssl", "allow", "t TLS"), ("hostssl", "verify-ca", "t TLS"), ("hostssl", "verify-full", "t TLS"), ("hostssl", "disable", "no encryption"),
    ("hostnossl", "prefer", "f 4MB"), ("hostnossl", "allow", "f 4MB"), ("hostnossl", "require", "SSL encryption"),
])
def test_sslmode(through, pg, rules, mode, says):
    other = {"hostssl": "hostnossl", "hostnossl": "hostssl"}.get(rules)
    with hba(pg, f"{rules} all all 127.0.0.1/32 scram-sha-256", *([f"{other} all all 127.0.0.1/32 reject"] if other else [])):
        got = through(url(pg, f"sslmode={mode}" + (f"&sslrootcert={pg.ca}" if mode.startswith("verify") else "")))
    if says.endswith("encryption"):
        assert got[0] == "28000" and says in got[1], got
    else:
        assert got.startswith(says), got


@pytest.mark.parametrize("query", ["", "sslmode=prefer&"])
def test_a_named_ca_is_verified_with_prefer_too(through, pg, tmp_path, query):
    harness.make_certificates(tmp_path)
    with hba(pg, "host all all 127.0.0.1/32 scram-sha-256"):
        assert "t TLS" in through(url(pg, f"{query}sslrootcert={pg.ca}"))
        assert through(url(pg, f"{query}sslrootcert={tmp_path / 'ca.crt'}")).startswith("f")


def test_system_ca_is_the_default_off_loopback(through, pg):
    # Another name than loopback's for the same server: hostaddr.
    upstream = {"url": None, "host": "db.example.com", "hostaddr": "127.0.0.1", "port": pg.port, "user": USER, "password": PASSWORD, "dbname": DATABASE}
    assert "t TLS" in through({**upstream, "host": "localhost", "sslmode": "verify-full", "sslrootcert": str(pg.ca)})
    code, text = through({**upstream, "sslmode": "verify-full", "sslrootcert": str(pg.ca)})
    assert code == "08006" and "hostname mismatch" in text
    code, text = through({**upstream, "sslmode": "verify-full"})
    assert code == "08006" and "certificate in certificate chain" in text and "sslrootcert" in text


@pytest.mark.parametrize("method,query,says", [
    ("md5", "sslmode=require", None),
    ("md5", "sslmode=disable", None),
    ("md5", "sslmode=require&require_auth=scram-sha-256", "require_auth"),
    ("md5", "sslmode=require&channel_binding=require", "channel binding required"),
    ("password", "sslmode=require", None),
    ("password", "sslmode=disable", "cleartext password on an unencrypted connection"),
    ("password", "sslmode=disable&require_auth=password", None),
    ("password", "sslmode=require&require_auth=!password", "require_auth"),
    ("trust", "sslmode=require", None),
    ("trust", "sslmode=require&require_auth=!none", "require_auth"),
    ("scram-sha-256", "sslmode=require&channel_binding=require", None),
    ("scram-sha-256", "sslmode=require&channel_binding=disable", None),
    ("scram-sha-256", "sslmode=disable&channel_binding=require", "channel binding is required"),
    ("scram-sha-256", "sslmode=require&require_auth=md5,password", "require_auth"),
])
def test_the_servers_method(through, pg, method, query, says):
    with pg.admin() as admin:
        admin.execute(f"SET password_encryption = '{'md5' if method == 'md5' else 'scram-sha-256'}'")
        admin.execute(f"ALTER ROLE {OTHER_USER} PASSWORD '{OTHER_PASSWORD}'")
    try:
        with hba(pg, f"host all {OTHER_USER} 127.0.0.1/32 {method}"):
            got = through(url(pg, query, OTHER_USER, OTHER_PASSWORD, database=OTHER_DATABASE), OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE)
    finally:
        pg.sql(f"ALTER ROLE {OTHER_USER} PASSWORD '{OTHER_PASSWORD}'")
    if says:
        assert got[0] == "28000" and says in got[1], got
    else:
        assert isinstance(got, str), got


def test_client_certificate(through, pg, tmp_path):
    key, encrypted, open_to_all = tmp_path / "ok.key", tmp_path / "encrypted.key", tmp_path / "open.key"
    for file in (key, open_to_all):
        shutil.copy(pg.certificates / "client.key", file)
    subprocess.run(["openssl", "ec", "-aes256", "-passout", "pass:key secret", "-in", key, "-out", encrypted], check=True, capture_output=True)
    der = tmp_path / "der.key"
    subprocess.run(["openssl", "ec", "-outform", "DER", "-in", key, "-out", der], check=True, capture_output=True)
    for file, mode in ((key, 0o600), (encrypted, 0o600), (der, 0o600), (open_to_all, 0o644)):
        file.chmod(mode)
    keys = {**url(pg, "sslmode=require", password=None), "sslcert": str(pg.certificates / "client.crt")}
    with hba(pg, f"hostssl all {USER} 127.0.0.1/32 cert"):
        assert f"/CN={USER}" in through({**keys, "sslkey": str(key)})
        assert f"/CN={USER}" in through({**keys, "sslkey": str(der)})
        assert f"/CN={USER}" in through({**keys, "sslkey": str(encrypted), "sslpassword": "key secret"})
        for file, password, says in ((encrypted, "no", "could not load private key file"), (open_to_all, "", "has group or world access")):
            (tmp_path / "bad.yaml").write_text(json.dumps({"upstream": {**keys, "sslkey": str(file), "sslpassword": password}}))
            refused = subprocess.run([harness.BINARY, "--config", tmp_path / "bad.yaml"], capture_output=True, text=True, timeout=20)
            assert refused.returncode == 2 and says in refused.stderr and str(file) in refused.stderr, refused
        assert "valid client certificate" in through(url(pg, "sslmode=require", password=None))[1]


def test_sslcertmode_require_wants_the_server_to_ask(through, pg, tmp_path):
    key = tmp_path / "client.key"
    shutil.copy(pg.certificates / "client.key", key)
    key.chmod(0o600)
    keys = {"sslcert": str(pg.certificates / "client.crt"), "sslkey": str(key), "sslcertmode": "require"}
    assert f"/CN={USER}" in through({**url(pg, "sslmode=require"), **keys})
    with TlsFront(pg, pg.certificates, sslrequest=True) as front:  # which asks for none
        code, text = through({**url(pg, "sslmode=require", port=front.port), **keys})
        assert code == "08006" and "did not request an SSL certificate" in text


def test_revoked_certificates_of_a_directory(through, pg, tmp_path):
    lists = tmp_path / "crls"
    lists.mkdir()
    (tmp_path / "index").touch()
    ca = pg.certificates / "ca"
    (tmp_path / "ca.cnf").write_text("[ca]\ndefault_ca = own\n[own]\ndatabase = %s\ndefault_md = sha256\ndefault_crl_days = 30\n" % (tmp_path / "index"))
    openssl = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    of_ca = ["openssl", "ca", "-config", tmp_path / "ca.cnf", "-keyfile", f"{ca}.key", "-cert", f"{ca}.crt"]
    name = openssl(["openssl", "x509", "-noout", "-subject_hash", "-in", f"{ca}.crt"]).stdout.strip() + ".r0"
    upstream = {**url(pg, f"sslmode=verify-ca&sslrootcert={pg.ca}"), "sslcrldir": str(lists)}
    openssl([*of_ca, "-gencrl", "-out", lists / name])
    assert "t TLS" in through(upstream)
    openssl([*of_ca, "-revoke", pg.certificates / "server.crt"])
    openssl([*of_ca, "-gencrl", "-out", lists / name])
    assert "certificate revoked" in through(upstream)[1]


class TlsFront(Listening):
    """A TLS server that speaks it at once (sslnegotiation=direct) and passes the bytes on in plain; what each handshake was is in `seen`."""

    def __init__(self, pg, certificates, sslrequest=False):
        self.pg, self.seen, self.sslrequest = pg, [], sslrequest
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
        self.context.set_alpn_protocols(["postgresql"])
        self.context.sni_callback = lambda sock, name, context: setattr(self, "sni", name)
        self.sni = None
        super().__init__()

    def serve(self, client):
        if self.sslrequest:
            client.recv(8)
            client.sendall(b"S")
        near = self.context.wrap_socket(client, server_side=True)
        self.seen.append((self.sni, near.selected_alpn_protocol(), near.session_reused))
        far = socket.create_connection(("127.0.0.1", self.pg.port))
        for source, target in ((near, far), (far, near)):
            threading.Thread(target=self._relay, args=(source, target), daemon=True).start()

    @staticmethod
    def _relay(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("direct", [True, False])
def test_sni_alpn_and_resumption(proxies, pg, direct):
    with hba(pg, "host all all 127.0.0.1/32 scram-sha-256"), TlsFront(pg, pg.certificates, sslrequest=not direct) as front:
        proxy = proxies({"pool": {"maxUses": 1, "max": 1}}, url=url(
            pg, f"sslmode=verify-full&sslrootcert={pg.ca}" + ("&sslnegotiation=direct" if direct else ""), host="localhost", port=front.port)["url"])
        with proxy.connect(prepare_threshold=None) as client:
            for _ in range(4):
                assert client.execute("SELECT 1").fetchone() == (1,)
        assert len(front.seen) >= 3
        assert {s[:2] for s in front.seen} == {("localhost", "postgresql" if direct else None)}
        assert not front.seen[0][2] and front.seen[-1][2], "a later session is resumed"


def verifier(password, iterations, salt=b"sixteen bytes of"):
    """What pg_authid has of a password."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    encode = lambda data: base64.b64encode(data).decode()
    return f"SCRAM-SHA-256${iterations}:{encode(salt)}${encode(stored)}:{encode(hmac.digest(salted, b'Server Key', 'sha256'))}"


@pytest.mark.parametrize("password", ["no\u00a0break", "soft\u00adhyphen", "\ufb01ne", "e\u0301", "\u00e9", "\u2168", "\u0007\u00aa", "\u0627\u0031", "\u00ad"],
                         ids=ascii)
def test_passwords_are_prepared_as_the_server_does(proxies, pg, password):
    """SASLprep (RFC 4013), where it can be: by libpq on one side and by the server on the other."""
    pg.sql(f"CREATE ROLE prepared LOGIN PASSWORD '{password}'")
    try:
        with pg.connect(user="prepared", password=password) as direct:
            direct.execute("SELECT 1")
        proxy = proxies({"users": {"prepared": {"password": "${SECRET}"}}}, environment={"SECRET": password})
        with proxy.connect(user="prepared", password=password) as client:
            assert client.execute("SELECT current_user").fetchone() == ("prepared",)
        proxy.stop()
    finally:
        pg.sql("DROP ROLE prepared")


def test_others_are_served_while_keys_are_derived(proxies, pg):
    pg.sql(f"CREATE ROLE slow_login LOGIN PASSWORD '{verifier('slow', 3_000_000)}'")
    try:
        proxy = proxies({"users": {USER: {}, "slow_login": {"password": "slow"}}, "pool": {"connectionTimeoutMillis": 60000}})
        with proxy.connect() as busy:
            busy.execute("SELECT 1")  # it has its server connection
            login = threading.Thread(target=lambda: proxy.connect(user="slow_login", password="slow").close(), daemon=True)
            began = last = time.monotonic()
            longest = 0
            login.start()
            while login.is_alive():
                busy.execute("SELECT 1")
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            assert longest < (last - began) / 2, "what takes the login's time doesn't take the others'"
        with proxy.connect(user="slow_login", password="slow") as slow:
            assert slow.execute("SELECT current_user").fetchone() == ("slow_login",)
    finally:
        pg.sql("DROP ROLE slow_login")


# ---- connection strings

def test_hosts_are_tried_in_turn(through, pg):
    dead = harness.free_port()
    keys = {"user": USER, "password": PASSWORD, "dbname": DATABASE, "sslmode": "require"}
    assert "t TLS" in through({"url": f"postgresql://{USER}:{harness.percent(PASSWORD)}@127.0.0.1:{dead},127.0.0.1:{pg.port}/{DATABASE}?sslmode=require"})
    assert "t TLS" in through({"host": "no-such-host.invalid,127.0.0.1", "port": str(pg.port), **keys})
    code, text = through({"host": "127.0.0.1,no-such-host.invalid", "port": str(dead), **keys})
    assert code == "08006" and ("refused" in text or "translate" in text)
    # As libpq does, all hosts are told and not the last one alone.
    code, text = through({"host": "127.0.0.1,127.0.0.2", "port": f"{dead},{harness.free_port()}", **keys})
    assert code == "08006" and re.fullmatch(r'(connection to server at "127.0.0.[12]", port \d+ failed: Connection refused\n?){2}', text), text


MISFITS = {"read-write": "session is read-only", "read-only": "session is not read-only", "standby": "server is not in hot standby mode"}


@pytest.mark.parametrize("attrs,primary,read_only", [
    ("any", True, True), ("read-write", True, False), ("read-only", False, True), ("primary", True, True), ("standby", False, False), ("prefer-standby", True, True)])
def test_target_session_attrs(through, pg, attrs, primary, read_only):
    for fits, setting in ((primary, "off"), (read_only, "on")):
        pg.sql(f"ALTER ROLE {USER} SET default_transaction_read_only = {setting}")
        try:
            got = through(url(pg, f"sslmode=require&target_session_attrs={attrs}"))
        finally:
            pg.sql(f"ALTER ROLE {USER} RESET default_transaction_read_only")
        assert isinstance(got, str) if fits else f"{MISFITS[attrs]} (target_session_attrs={attrs})" in got[1], (setting, got)


class OldServer(Gate):
    """Leaves out what servers before PostgreSQL 14 don't report."""

    def _relay(self, source, target, pair, seen):
        if seen is not None:
            return super()._relay(source, target, pair, seen)
        try:
            stream = source.makefile("rb")
            while head := stream.read(5):
                message = head + stream.read(int.from_bytes(head[1:], "big") - 4)
                if not message[5:].startswith((b"in_hot_standby", b"default_transaction_read_only")):
                    target.sendall(message)
        except OSError:
            pass
        target.close()


@pytest.mark.parametrize("attrs,primary,read_only", [
    ("any", True, True), ("read-write", True, False), ("read-only", False, True), ("primary", True, True), ("standby", False, False), ("prefer-standby", True, True)])
def test_target_session_attrs_of_a_server_that_does_not_report_them(through, pg, attrs, primary, read_only):
    with hba(pg, f"hostnossl all {USER} 127.0.0.1/32 scram-sha-256"), OldServer(pg.port) as old:
        for fits, setting in ((primary, "off"), (read_only, "on")):
            pg.sql(f"ALTER ROLE {USER} SET default_transaction_read_only = {setting}")
            try:
                got = through(url(pg, f"sslmode=disable&target_session_attrs={attrs}", port=old.port))
            finally:
                pg.sql(f"ALTER ROLE {USER} RESET default_transaction_read_only")
            assert got == "f 4MB" if fits else "target_session_attrs" in got[1], (setting, got)


def test_unix_socket_upstream(through, pg):
    for upstream in ({"url": f"postgresql://{USER}@{harness.percent(str(pg.directory))}:{pg.port}/{DATABASE}"},
                     {"host": str(pg.directory), "port": str(pg.port), "user": USER, "dbname": DATABASE}):
        assert through(upstream) == "f 4MB"


def test_startup_parameters_of_the_url(through, pg):
    assert through(url(pg, "sslmode=require&application_name=of%20the%20url&options=-c%20work_mem%3D5MB")).endswith("of the url 5MB")
    assert through(url(pg, "sslmode=require&fallback_application_name=fallback")).endswith("fallback 4MB")


def test_environment_of_libpq(through, pg):
    environment = {"PGHOST": "127.0.0.1", "PGPORT": str(pg.port), "PGUSER": USER, "PGPASSWORD": PASSWORD, "PGDATABASE": DATABASE, "PGSSLMODE": "require",
                   "PGAPPNAME": "by environment", "PGOPTIONS": "-c work_mem=6MB"}
    assert through({"url": "postgresql://"}, environment=environment).endswith("by environment 6MB")


def test_every_key_of_the_upstream_is_a_variable(through, pg):
    environment = {"PGSIDECAR_UPSTREAM_HOST": "127.0.0.1", "PGSIDECAR_UPSTREAM_PORT": str(pg.port), "PGSIDECAR_UPSTREAM_USER": USER,
                   "PGSIDECAR_UPSTREAM_PASSWORD": PASSWORD, "PGSIDECAR_UPSTREAM_DBNAME": DATABASE, "PGSIDECAR_UPSTREAM_APPLICATION_NAME": "variables"}
    assert "variables" in through({"url": "postgresql://nobody@127.0.0.1:1/nowhere"}, environment=environment)


def test_passfile(through, pg, tmp_path):
    file = tmp_path / "passfile"
    secret = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    file.write_text(f"# comment\nlocalhost:*:*:*:wrong\n127.0.0.1:{pg.port}:{DATABASE}:{USER}:{secret}\n")
    file.chmod(0o600)
    assert "t TLS" in through(url(pg, f"sslmode=require&passfile={file}", password=None))
    assert "t TLS" in through(url(pg, "sslmode=require", password=None), environment={"PGPASSFILE": str(file)})
    file.chmod(0o644)
    code, text = through(url(pg, f"sslmode=require&passfile={file}", password=None))
    assert code == "28P01" and "none was supplied" in text


def test_service(through, pg, tmp_path):
    file = tmp_path / "services"
    file.write_text(f"[other]\nhost=no\n[mine]\nhost=127.0.0.1\nport={pg.port}\nuser={USER}\npassword={PASSWORD}\ndbname={DATABASE}\nsslmode=require\n")
    assert "t TLS" in through({"url": f"postgresql://?service=mine&servicefile={file}"})
    assert "t TLS" in through({"url": "service=mine"}, environment={"PGSERVICEFILE": str(file)})


def test_passfile_has_a_line_for_each_host(through, pg, tmp_path):
    file = tmp_path / "passfile"
    file.write_text("localhost:*:*:*:wrong\n127.0.0.1:*:*:*:" + PASSWORD.replace(":", "\\:") + "\n")
    file.chmod(0o600)
    hosts = f"localhost:{harness.free_port()},127.0.0.1:{pg.port}"
    assert "t TLS" in through({"url": f"postgresql://{USER}@{hosts}/{DATABASE}?sslmode=require&passfile={file}"})


def test_secret_file_within_the_url(through, pg, tmp_path):
    """As in the README: the file holds the password as it is, also one that a URI would want encoded."""
    file = tmp_path / "password"
    file.write_text(PASSWORD + "\n")
    assert "t TLS" in through({"url": "postgresql://%s:${file:%s}@127.0.0.1:%d/%s?sslmode=require" % (USER, file, pg.port, DATABASE)})


def test_connect_timeout_counts_for_each_host(through, pg):
    with socket.create_server(("127.0.0.1", 0), backlog=8) as silent:  # accepts and says nothing
        port = silent.getsockname()[1]
        hosts = f"127.0.0.1:{port},127.0.0.1:{pg.port}"
        url = f"postgresql://{USER}:{harness.percent(PASSWORD)}@{hosts}/{DATABASE}?sslmode=require&connect_timeout=1"
        assert "t TLS" in through({"url": url}, wait=15000)


def test_a_silent_host_leaves_time_for_the_next(proxies, pg):
    """Whose machine is gone: nothing answers, not even a refusal. Clients get through within their time."""
    with contextlib.ExitStack() as sockets:
        hosts = ""
        for _ in range(2):
            silent, filler = (sockets.enter_context(socket.socket()) for _ in range(2))
            silent.bind(("127.0.0.1", 0))
            silent.listen(0)
            filler.connect(silent.getsockname())  # what comes now is dropped, since nobody accepts
            hosts += f"127.0.0.1:{silent.getsockname()[1]},"
        hosts += f"127.0.0.1:{pg.port}"
        proxy = proxies({"pool": {"connectionTimeoutMillis": 4000}},
                        url=f"postgresql://{USER}:{harness.percent(PASSWORD)}@{hosts}/{DATABASE}?sslmode=require")

        def work(_):
            with proxy.connect() as client:
                return client.execute("SELECT 1").fetchone()
        assert harness.threads(4, work) == [(1,)] * 4


@pytest.mark.parametrize("sslmode", ["disable", "prefer", "require"])
def test_a_host_that_accepts_and_is_silent_leaves_time_for_the_next(proxies, pg, sslmode):
    with hba(pg, "host all all 127.0.0.1/32 scram-sha-256"), socket.create_server(("127.0.0.1", 0), backlog=8) as silent:
        hosts = f"127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{pg.port}"
        proxy = proxies({"pool": {"connectionTimeoutMillis": 4000}},
                        url=f"postgresql://{USER}:{harness.percent(PASSWORD)}@{hosts}/{DATABASE}?sslmode={sslmode}")
        with proxy.connect() as client:
            assert client.execute("SELECT 1").fetchone() == (1,)


def test_who_waits_for_a_connect_is_told_for_which(proxies, pg):
    with Gate(pg.port) as gate:
        gate.silent = True
        proxy = proxies({"pool": {"max": 3, "connectionTimeoutMillis": 1000}},
                        url=f"postgresql://{USER}:{harness.percent(PASSWORD)}@127.0.0.1:{gate.port}/{DATABASE}?sslmode=require&connect_timeout=20")
        with wire.Wire(proxy.port) as client:
            error = client.login(USER, PASSWORD, DATABASE).error
        assert error["C"] == "08006"
        assert re.fullmatch(r"timed out after 1000 ms waiting for a server connection: 1 of 3 in use, of which 1 being opened: "
                            rf'connecting to server at "127.0.0.1", port {gate.port} for 1\.\d s', error["M"])


def test_keepalive_of_the_connection(proxies, pg):
    for query, idle in (("", range(1, 11)), ("&keepalives_idle=33&keepalives_interval=7&keepalives_count=3", range(20, 34)), ("&keepalives=0", None)):
        proxy = proxies(url=url(pg, "sslmode=require" + query)["url"])
        with proxy.connect() as client:
            port = client.execute("SELECT client_port FROM pg_stat_activity WHERE pid = pg_backend_pid()").fetchone()[0]
            shown = subprocess.run(["ss", "-tnoH", "sport", f"= :{port}"], capture_output=True, text=True, check=True).stdout
        timer = re.search(r"timer:\(keepalive,(\d+)(\.\d+)?(ms|sec)", shown)
        if idle is None:
            assert not timer, shown
        else:
            assert timer and int(timer[1]) in idle, shown


def test_a_keepalive_of_weeks_is_the_longest_that_there_is(proxies, pg):
    """Nine hours, instead of the two of the kernel's default."""
    proxy = proxies({"pool": {"keepAliveInitialDelayMillis": 2147483648}})
    with proxy.connect() as client:
        port = client.execute("SELECT client_port FROM pg_stat_activity WHERE pid = pg_backend_pid()").fetchone()[0]
        shown = subprocess.run(["ss", "-tnoH", "sport", f"= :{port}"], capture_output=True, text=True, check=True).stdout
        assert re.search(r"timer:\(keepalive,54\dmin", shown), shown


def test_names_are_looked_up_anew_each_time(proxies, pg, tmp_path):
    """A hosts file of the proxy's own, in a mount namespace; the name has two addresses, of which the second serves."""
    hosts, binary = tmp_path / "hosts", tmp_path / "pgsidecar"
    hosts.write_text("127.0.0.2 db.test\n127.0.0.1 localhost\n")
    binary.write_text(f'#!/bin/sh\nexec unshare -m sh -c \'mount --bind {hosts} /etc/hosts && exec {harness.BINARY} "$@"\' sh "$@"\n')
    binary.chmod(0o755)
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    proxy = proxies({"pool": {"connectionTimeoutMillis": 1000}}, url=url(pg, "sslmode=require", host="db.test")["url"], binary=binary)

    def login():
        with wire.Wire(proxy.port) as w:
            failure = w.login(USER, PASSWORD, DATABASE)
            return failure and failure.error["M"]

    assert "refused" in login()
    hosts.write_text("127.0.0.1 db.test\n")
    harness.poll(lambda: login() is None, 15, "the new address is used")
    hosts.write_text("::1 db.test\n127.0.0.3 db.test\n127.0.0.1 db.test\n")
    pg.sql("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'app'")
    harness.poll(lambda: login() is None, 15, "each of a name's addresses is tried")


# ---- what is not as it should be

def test_a_refused_login_is_not_tried_elsewhere(through, pg):
    def refused():
        return pg.log.read_text().count(f'password authentication failed for user "{USER}"')
    before = refused()
    through({"url": f"postgresql://{USER}:wrong@127.0.0.1:{pg.port},localhost:{pg.port}/{DATABASE}?sslmode=require"})
    assert refused() - before == 1


def test_reload_of_the_upstream_counts(proxies, pg):
    proxy = proxies(url=pg.url())
    with proxy.connect() as client:
        client.execute("SELECT 1")
        proxy.write_config(harness.merge(proxy.config, {"upstream": {"options": "-c work_mem=9MB"}}))
        proxy.signal(signal.SIGHUP)
        harness.poll(lambda: "upstream.options changed" in proxy.log_text(), what="the reload is told")
        harness.poll(lambda: client.execute("SHOW work_mem").fetchone() == ("9MB",), 2, "the next connection is made with it")


def test_reload_keeps_the_pool_settings_of_sections(proxies, pg):
    proxy = proxies({"databases": {DATABASE: {}, "*": {"pool": {"max": 3}}}, "users": {USER: {"pool": {"max": 2}}, OTHER_USER: {"password": OTHER_PASSWORD}}})
    with proxy.connect() as a, proxy.connect(OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE) as b:
        a.execute("SELECT 1"), b.execute("SELECT 1")
        limits = [(p["user"], p["max"]) for p in proxy.stats()["perPool"]]
        assert limits == [(USER, 2), (OTHER_USER, 3)]
        assert proxy.http("/api/admin/reload", "POST")[0] == 200
        assert b.execute("SELECT 1").fetchone() == (1,)
        assert [(p["user"], p["max"]) for p in proxy.stats()["perPool"]] == limits


def test_reload_takes_a_database_away(proxies, pg):
    proxy = proxies({"databases": {DATABASE: {}, OTHER_DATABASE: {}}})
    with wire.Wire(proxy.port) as w:
        w.login(USER, PASSWORD, OTHER_DATABASE)
    config = dict(proxy.config, databases={DATABASE: {}})
    proxy.write_config(config)
    assert proxy.http("/api/admin/reload", "POST")[0] == 200
    with wire.Wire(proxy.port) as w:
        failure = w.login(USER, PASSWORD, OTHER_DATABASE)
        assert failure and failure.error["C"] == "3D000"


def test_an_encoding_that_there_is_not_is_told_at_once(proxies, pg):
    proxy = proxies({"pool": {"connectionTimeoutMillis": 30000}}, url=pg.url(sslmode="require") + "&client_encoding=nope")
    with wire.Wire(proxy.port, timeout=10) as w:
        error = w.login(USER, PASSWORD, DATABASE).error
    assert (error["C"], error["M"]) == ("22023", 'invalid value for parameter "client_encoding": "nope"')


def test_a_refusal_of_the_database_is_told_at_once_and_whole(proxies, pg):
    pg.sql(f"REVOKE CONNECT ON DATABASE {OTHER_DATABASE} FROM public")
    try:
        proxy = proxies({"databases": {"*": {}}, "pool": {"connectionTimeoutMillis": 3000}})
        with wire.Wire(proxy.port, timeout=2) as w:
            error = w.login(USER, PASSWORD, OTHER_DATABASE).error
    finally:
        pg.sql(f"GRANT CONNECT ON DATABASE {OTHER_DATABASE} TO public")
    assert (error["C"], error["M"], error.get("D")) == ("42501", f'permission denied for database "{OTHER_DATABASE}"', "User does not have CONNECT privilege.")
