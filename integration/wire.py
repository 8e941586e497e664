"""PostgreSQL's wire protocol by hand: what a test must send or see that no driver would (PostgreSQL documentation, chapter 55)."""
import base64
import hashlib
import hmac
import os
import select
import socket
import ssl
import struct
from typing import NamedTuple

V3_0, V3_2 = 196608, 196610
SSL_REQUEST, GSSENC_REQUEST, CANCEL_REQUEST = 80877103, 80877104, 80877102


class Message(NamedTuple):
    type: str
    body: bytes

    @property
    def error(self):
        """Fields of an ErrorResponse or NoticeResponse by their letters."""
        return {part[:1].decode(): part[1:].decode() for part in self.body.split(b"\0") if part}

    @property
    def row(self):
        """Columns of a DataRow."""
        count, at, columns = struct.unpack_from("!h", self.body)[0], 2, []
        for _ in range(count):
            (size,) = struct.unpack_from("!i", self.body, at)
            at += 4
            columns.append(None if size < 0 else self.body[at:at + size])
            at += max(size, 0)
        return columns

    @property
    def tag(self):
        return self.body.rstrip(b"\0").decode()


class Closed(Exception):
    """The other side closed the connection."""


def kinds(messages):
    """Their types, a letter each."""
    return "".join(m.type for m in messages)


def healthy(w):
    assert w.value("SELECT 'fine'") == "fine"


def frame(kind, body=b""):
    return kind.encode() + struct.pack("!i", len(body) + 4) + body


def text(value):
    return (value.encode() if isinstance(value, str) else value) + b"\0"


def query(sql):
    return frame("Q", text(sql))


def parse(sql, name="", types=()):
    return frame("P", text(name) + text(sql) + struct.pack("!h", len(types)) + b"".join(struct.pack("!I", t) for t in types))


def bind(statement="", values=(), portal="", formats=(), results=()):
    """The formats: of each value, or column, 0 is text, 1 binary; none: all are text."""
    body = text(portal) + text(statement) + struct.pack(f"!h{len(formats)}hh", len(formats), *formats, len(values))
    for value in values:
        if value is None:
            body += struct.pack("!i", -1)
        else:
            data = value.encode() if isinstance(value, str) else value
            body += struct.pack("!i", len(data)) + data
    return frame("B", body + struct.pack(f"!h{len(results)}h", len(results), *results))


def describe(kind, name=""):
    return frame("D", kind.encode() + text(name))


def execute(portal="", rows=0):
    return frame("E", text(portal) + struct.pack("!i", rows))


def close(kind, name=""):
    return frame("C", kind.encode() + text(name))


def copy_data(data):
    return frame("d", data)


def copy_fail(reason):
    return frame("f", text(reason))


def function_call(oid, *values):
    body = struct.pack("!Ihh", oid, 0, len(values))
    for value in values:
        body += struct.pack("!i", len(value)) + value
    return frame("F", body + struct.pack("!h", 0))


SYNC, FLUSH, COPY_DONE, TERMINATE = frame("S"), frame("H"), frame("c"), frame("X")


def startup_packet(parameters, version=V3_0):
    body = struct.pack("!i", version) + b"".join(text(k) + text(v) for k, v in parameters.items()) + b"\0"
    return struct.pack("!i", len(body) + 4) + body


def request(code, body=b""):
    return struct.pack("!ii", len(body) + 8, code) + body


class Wire:
    """One raw connection."""

    most = 1 << 16  # that is read at once

    def __init__(self, port, host="127.0.0.1", timeout=15):
        if host.startswith("/"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout)
            self.sock.connect(f"{host}/.s.PGSQL.{port}")
        else:
            self.sock = socket.create_connection((host, port), timeout)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer, self.parameters, self.pid, self.key, self.negotiated = b"", {}, 0, b"", None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def send(self, *frames):
        self.sock.sendall(b"".join(frames))

    def ready(self):
        """True if something has come."""
        return self.buffer or isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() or select.select([self.sock], [], [], 0)[0]

    def bytes(self, count):
        parts, have = [self.buffer], len(self.buffer)
        while have < count:
            data = self.sock.recv(self.most)
            if not data:
                raise Closed()
            parts.append(data)
            have += len(data)
        data = b"".join(parts)
        self.buffer = data[count:]
        return data[:count]

    def recv(self):
        head = self.bytes(5)
        message = Message(chr(head[0]), self.bytes(struct.unpack("!i", head[1:])[0] - 4))
        if message.type == "S":
            name, value = message.body.split(b"\0")[:2]
            self.parameters[name.decode()] = value.decode()
        return message

    def until(self, kind="Z"):
        """All messages up to the first of one of the types given, which is the last of the list."""
        messages = []
        while not messages or messages[-1].type not in kind:
            messages.append(self.recv())
        return messages

    def ask(self, *frames):
        """Sends and returns all up to ReadyForQuery."""
        self.send(*frames)
        return self.until()

    def value(self, sql):
        """The first column of the first row; raises on an error."""
        messages = self.ask(query(sql))
        for message in messages:
            if message.type == "E":
                raise RuntimeError(message.error)
        return next(m.row[0] for m in messages if m.type == "D").decode()

    def closed(self):
        """Waits for the other side to close; returns what came before."""
        messages = []
        try:
            while True:
                messages.append(self.recv())
        except (Closed, ConnectionResetError, BrokenPipeError):
            return messages

    def login(self, user, password, database, version=V3_0, **parameters):
        """Everything up to ReadyForQuery; returns the ErrorResponse if it fails."""
        self.send(startup_packet({"user": user, "database": database, **parameters}, version))
        scram = None
        while True:
            message = self.recv()
            if message.type == "E":
                return message
            if message.type == "R":
                (code,) = struct.unpack_from("!i", message.body)
                if code == 3:
                    self.send(frame("p", text(password)))
                elif code == 5:
                    inner = hashlib.md5((password + user).encode()).hexdigest().encode()
                    self.send(frame("p", text("md5" + hashlib.md5(inner + message.body[4:8]).hexdigest())))
                elif code == 10:
                    scram = Scram(password)
                    first = scram.first()
                    self.send(frame("p", text("SCRAM-SHA-256") + struct.pack("!i", len(first)) + first))
                elif code == 11:
                    self.send(frame("p", scram.final(message.body[4:])))
                elif code == 12:
                    scram.verify(message.body[4:])
            elif message.type == "K":
                self.pid, self.key = struct.unpack_from("!I", message.body)[0], message.body[4:]
            elif message.type == "v":
                self.negotiated = message
            elif message.type == "Z":
                return None


def encrypted(w, ca=None, alpn=None, certificate=None):
    """TLS on the raw connection from here on; without a CA with whoever it is."""
    context = ssl.create_default_context(cafile=ca)
    if not ca:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols([alpn])
    if certificate:
        context.load_cert_chain(*certificate)
    w.sock = context.wrap_socket(w.sock, server_hostname="localhost")


def wire_error(port, tls, user, password, database, **parameters):
    """The fields of a login's error; None if it succeeds."""
    with Wire(port) as w:
        if tls:
            w.send(request(SSL_REQUEST))
            assert w.bytes(1) == b"S"
            encrypted(w)
        failure = w.login(user, password, database, **parameters)
        return failure and {k: v for k, v in failure.error.items() if k in "SVCMDH"}


class Scram:
    """SCRAM-SHA-256's client without channel binding (RFC 5802, RFC 7677)."""

    def __init__(self, password):
        self.password = password.encode()
        self.nonce = base64.b64encode(os.urandom(18)).decode()

    def first(self):
        self.bare = f"n=,r={self.nonce}"
        return ("n,," + self.bare).encode()

    def final(self, server_first):
        fields = dict(part.split("=", 1) for part in server_first.decode().split(","))
        assert fields["r"].startswith(self.nonce)
        salted = hashlib.pbkdf2_hmac("sha256", self.password, base64.b64decode(fields["s"]), int(fields["i"]))
        key = hmac.digest(salted, b"Client Key", "sha256")
        without_proof = f"c=biws,r={fields['r']}"
        signed = f"{self.bare},{server_first.decode()},{without_proof}".encode()
        signature = hmac.digest(hashlib.sha256(key).digest(), signed, "sha256")
        self.server_signature = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256")
        proof = bytes(a ^ b for a, b in zip(key, signature))
        return f"{without_proof},p={base64.b64encode(proof).decode()}".encode()

    def verify(self, server_final):
        assert server_final == b"v=" + base64.b64encode(self.server_signature)
