"""Clients and TLS: how a connection may begin, certificates of both sides, direct TLS (PostgreSQL documentation, section 55.2.11)."""
import ssl

import psycopg
import pytest

import wire
from harness import DATABASE, OTHER_PASSWORD, OTHER_USER, PASSWORD, USER, certified, psql
from wire import encrypted, wire_error


def test_tls_for_clients(proxies, tmp_path):
    files = certified(tmp_path)
    proxy = proxies({"tls": {"mode": "require", **files}})
    for extra in ({}, {"channel_binding": "require"}):
        with proxy.connect(sslmode="verify-full", sslrootcert=files["ca"], **extra) as connection:
            assert connection.pgconn.ssl_in_use
            assert connection.execute("SELECT 1").fetchone() == (1,)
    error = wire_error(proxy.port, False, USER, PASSWORD, DATABASE)
    assert error["S"] == "FATAL" and error["C"] == "28000", error
    optional = proxies({"tls": {"mode": "allow", **files}})
    for mode in ("disable", "require"):
        with optional.connect(sslmode=mode) as connection:
            assert connection.pgconn.ssl_in_use == (mode == "require")
            assert connection.execute("SELECT repeat('x', 1000000)").fetchone()[0] == "x" * 1000000


def test_client_certificates(proxies, tmp_path):
    files = certified(tmp_path)
    proxy = proxies({"tls": {"mode": "verify-full", **files}, "auth": {"method": "cert"}})
    keys = {"sslmode": "verify-full", "sslrootcert": files["ca"]}
    with proxy.connect(password=None, sslcert=tmp_path / "client.crt", sslkey=tmp_path / "client.key", **keys) as connection:
        assert connection.execute("SELECT current_user").fetchone() == (USER,)
    with pytest.raises(psycopg.OperationalError):
        proxy.connect(password=None, **keys)


def test_direct_tls(proxies, tmp_path):
    """TLS without an SSLRequest, as with sslnegotiation=direct, told by ALPN."""
    files = certified(tmp_path)
    proxy = proxies({"tls": {"mode": "require", **files}})
    context = ssl.create_default_context(cafile=files["ca"])
    context.set_alpn_protocols(["postgresql"])
    with wire.Wire(proxy.port) as w:
        w.sock = context.wrap_socket(w.sock, server_hostname="localhost")
        assert w.sock.selected_alpn_protocol() == "postgresql"
        assert w.login(USER, PASSWORD, DATABASE) is None
        assert w.value("SELECT 1") == "1"


def test_requests_before_and_within_tls(proxies, tmp_path):
    files = certified(tmp_path)
    proxy = proxies({"tls": {"mode": "require", **files}})
    with wire.Wire(proxy.port) as w:
        w.send(wire.request(wire.GSSENC_REQUEST))
        assert w.bytes(1) == b"N"
        w.send(wire.request(wire.SSL_REQUEST))
        assert w.bytes(1) == b"S"
        encrypted(w, files["ca"])
        assert w.login(USER, PASSWORD, DATABASE) is None
    for code in (wire.SSL_REQUEST, wire.GSSENC_REQUEST):  # not twice
        with wire.Wire(proxy.port) as w:
            w.send(wire.request(wire.SSL_REQUEST))
            assert w.bytes(1) == b"S"
            encrypted(w, files["ca"])
            w.send(wire.request(code))
            assert [m.error["C"] for m in w.closed()] == ["0A000"]
    with wire.Wire(proxy.port) as w:  # what somebody put before the handshake isn't taken for the client's (CVE-2021-23222)
        w.send(wire.request(wire.SSL_REQUEST) + wire.startup_packet({"user": USER, "database": DATABASE}))
        assert [m.error["C"] for m in w.closed()] == ["08P01"]


def test_tls_of_another_protocol_or_version_is_refused(proxies, tmp_path):
    files = certified(tmp_path)
    proxy = proxies({"tls": {"mode": "allow", **files}})
    with wire.Wire(proxy.port) as w, pytest.raises(ssl.SSLError, match="no application protocol"):
        encrypted(w, files["ca"], alpn="http/1.1")
        w.login(USER, PASSWORD, DATABASE)
    for least, most, works in (("TLSv1", "TLSv1.1", False), ("TLSv1.2", "TLSv1.2", True), ("TLSv1.3", "TLSv1.3", True)):
        done = psql({**proxy.environment(), "PGSSLMODE": "require", "PGSSLMINPROTOCOLVERSION": least, "PGSSLMAXPROTOCOLVERSION": most}, "-c", "SELECT 1")
        assert (done.stdout == "1\n") == works, done.stderr


def test_direct_tls_without_alpn_is_refused(proxies, tmp_path):
    files = certified(tmp_path)
    proxy = proxies({"tls": {"mode": "require", **files}})
    with wire.Wire(proxy.port) as w:
        encrypted(w, files["ca"])
        with pytest.raises((wire.Closed, OSError)):
            w.login(USER, PASSWORD, DATABASE)


def test_certificates_of_others_are_refused(proxies, tmp_path):
    files = certified(tmp_path)
    (tmp_path / "other").mkdir()
    certified(tmp_path / "other")
    proxy = proxies({"tls": {"mode": "require", **files}, "auth": {"method": "cert"}, "users": {USER: {}, OTHER_USER: {"password": OTHER_PASSWORD}}})
    own = {"sslmode": "require", "sslcert": tmp_path / "client.crt", "sslkey": tmp_path / "client.key", "password": None}
    with proxy.connect(**own) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    for user, keys, says in ((OTHER_USER, own, "certificate authentication failed"),
                             (USER, {"sslmode": "require", "sslcert": "/none", "password": None}, "certificate authentication failed"),
                             (USER, {**own, "sslcert": tmp_path / "other/client.crt", "sslkey": tmp_path / "other/client.key"}, "unknown ca")):
        with pytest.raises(psycopg.OperationalError, match=says):
            proxy.connect(user=user, **keys)


def test_login_timeout_in_the_middle_of_a_handshake(proxies, tmp_path):
    proxy = proxies({"limits": {"loginTimeoutMillis": 300}, "tls": {"mode": "allow", **certified(tmp_path)}})
    with wire.Wire(proxy.port, timeout=3) as w:
        w.send(wire.request(wire.SSL_REQUEST))
        assert w.bytes(1) == b"S"
        assert w.closed() == []
