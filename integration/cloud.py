"""A stand-in for what providers put in front of their databases: TLS with SNI, endpoints that sleep, startup parameters that get lost,
users with a suffix. Behind it is a real PostgreSQL, reached in plain."""
import select
import socket
import ssl
import struct
import threading
import time

import wire

NO_ENDPOINT = ("Endpoint ID is not specified. Either please upgrade the postgres client library (libpq) for SNI support or pass the endpoint ID "
               "(first part of the domain name) as a parameter: '?options=endpoint%3D<endpoint-id>'.")
FORWARDED = ("user", "database", "application_name", "replication", "options")  # by Neon's proxy

WAYS_TO_WAKE = ("refused", "reset", "handshake", "starting", "unreachable", "held")


class Router:
    """Accepts TLS on a free port and passes on to `pg`.

    `endpoint`: the first label that SNI (or options=endpoint=) must have; `parameters`: the startup parameters that are forwarded, None: all;
    `suffix`: what is cut off the user's name. `sessions` are the startup parameters of all that came so far, `messages` what
    clients have sent since, as pairs of type and text.
    """

    def __init__(self, pg, certificates, endpoint=None, parameters=None, suffix=""):
        self.pg, self.endpoint, self.parameters, self.suffix = pg, endpoint, parameters, suffix
        self.sessions, self.messages, self.handshakes = [], [], []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
        self.context.set_alpn_protocols(["postgresql"])
        self.context.sni_callback = lambda sock, name, context: setattr(sock, "server_name", name)
        self.way, self.wakes_in, self.awake_at = None, 0, 0.0
        self.cancel_takes = 0.0  # seconds that a cancel request is on its way
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open = False
        self._close_listener()

    def asked(self):
        """The SQL that clients have sent."""
        return [text for kind, text in self.messages if kind in "QP"]

    # ---- sleep

    def suspend(self, way="held", wakes_in=3.0):
        """Ends all sessions as a compute does that goes to sleep. The next connect wakes it up, which takes so many seconds; until
        then connects end as `way` says."""
        assert way in WAYS_TO_WAKE
        self.wakes_in, self.awake_at, self.way = wakes_in, None, way
        if way == "refused":
            self._close_listener()
        self.pg.sql("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE backend_type = 'client backend' AND client_port > 0")

    def begin_to_wake(self):
        """Where no connect can be seen, since it is refused."""
        threading.Timer(self.wakes_in, self._listen_again).start()

    def _close_listener(self):
        try:
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes up who accepts
        except OSError:
            pass
        self.listener.close()

    def _listen_again(self):
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.way = None
        threading.Thread(target=self._accept, daemon=True).start()

    def _awake(self):
        """Whether it is; the first who asks wakes it up."""
        if self.way is None:
            return True
        if self.awake_at is None:
            self.awake_at = time.monotonic() + self.wakes_in
        if time.monotonic() >= self.awake_at:
            self.way = None
        return self.way is None

    # ---- a connection

    def _accept(self):
        listener = self.listener
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near):
        try:
            near.settimeout(30)
            asleep = None if self._awake() else self.way
            if asleep == "reset":
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return near.close()
            if asleep == "held":
                time.sleep(max(0.0, self.awake_at - time.monotonic()))
            direct = near.recv(1, socket.MSG_PEEK) == b"\x16"
            if not direct:
                code = struct.unpack("!ii", exactly(near, 8))[1]
                if code != wire.SSL_REQUEST:
                    near.sendall(error("28000", "connection is insecure (try using `sslmode=require`)"))
                    return near.close()
                near.sendall(b"S")
            if asleep == "handshake":
                return near.close()
            near = self.context.wrap_socket(near, server_side=True)
            name = getattr(near, "server_name", None)
            self.handshakes.append((name, near.selected_alpn_protocol()))
            self._begin(near, name, asleep)
        except OSError:
            near.close()

    def _begin(self, near, name, asleep):
        size = struct.unpack("!i", exactly(near, 4))[0]
        packet = exactly(near, size - 4)
        if struct.unpack_from("!i", packet)[0] == wire.CANCEL_REQUEST:
            time.sleep(self.cancel_takes)
            with socket.create_connection(("127.0.0.1", self.pg.port)) as far:
                far.sendall(struct.pack("!i", size) + packet)
                far.recv(1)  # the server closes it when it has done so
            return near.close()
        words = packet[4:].split(b"\0")[:-2]
        startup = {k.decode(): v.decode() for k, v in zip(words[::2], words[1::2])}
        self.sessions.append(startup)
        options = startup.get("options", "").split(" ")
        given = {word.split("=", 1)[1] for word in options if word.startswith("endpoint=")} | ({name.split(".")[0]} if name else set())
        refusal = None
        if self.endpoint and not given:
            refusal = ("XX000", NO_ENDPOINT)
        elif self.endpoint and given != {self.endpoint}:
            refusal = ("XX000", "Inconsistent project name inferred from SNI")
        elif self.suffix and not startup["user"].endswith(self.suffix):
            refusal = ("XX000", "Tenant or user not found")
        elif asleep == "starting":
            refusal = ("57P03", "the database system is starting up")
        elif asleep == "unreachable":
            refusal = ("XX000", "Couldn't connect to compute node")
        if refusal:
            near.sendall(error(*refusal))
            return near.close()
        if self.parameters is not None:
            startup = {k: v for k, v in startup.items() if k in self.parameters} | {"client_encoding": "UTF8"}
            startup["options"] = " ".join(word for word in options if not word.startswith("endpoint="))
        startup["user"] = startup["user"].removesuffix(self.suffix)
        far = socket.create_connection(("127.0.0.1", self.pg.port))
        far.sendall(wire.startup_packet(startup))
        self._relay(near, far)

    def _relay(self, near, far):
        """In one thread, since OpenSSL's connections aren't for two."""
        sent = bytearray()
        try:
            while True:
                readable = [near] if near.pending() else select.select([near, far], [], [])[0]
                for source, target in ((near, far), (far, near)):
                    if source not in readable:
                        continue
                    source.settimeout(0)
                    try:
                        data = source.recv(65536)
                    except ssl.SSLWantReadError:
                        continue
                    if not data:
                        return
                    if source is near:
                        sent += data
                        self._note(sent)
                    target.settimeout(30)
                    target.sendall(data)
        except (OSError, ValueError):
            pass
        finally:
            near.close()
            far.close()

    def _note(self, sent):
        while len(sent) >= 5 and len(sent) > (size := struct.unpack_from("!i", sent, 1)[0]):
            self.messages.append((chr(sent[0]), bytes(sent[5:size + 1]).decode(errors="replace").strip("\0")))
            del sent[:size + 1]


def exactly(sock, count):
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise OSError("closed")
        data += more
    return data


def error(sqlstate, message):
    fields = {"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": message}
    return wire.frame("E", b"".join(k.encode() + wire.text(v) for k, v in fields.items()) + b"\0")
