"""A TCP gate between two parties: cuts, delays, slices, stalls, adds bytes. And what servers of a test's own begin with."""
import contextlib
import socket
import struct
import threading
import time


class Listening:
    """Listens on a free port until the block is left; its connections go to serve(socket), one after the other."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()

    def _accept(self):
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            with contextlib.suppress(OSError):
                self.serve(client)


class Gate:
    """Listens, on a free port unless told otherwise, and relays to host:port. What is set counts for bytes relayed from then on."""

    def __init__(self, port, host="127.0.0.1", listen=("127.0.0.1", 0)):
        self.target = (host, port)
        self.listener = socket.create_server(listen)
        self.port = self.listener.getsockname()[1]
        self.delay = 0.0        # seconds before each piece
        self.slice = 0          # bytes a piece; 0: as they come
        self.refusing = False   # new connections are closed at once
        self.silent = False     # new connections are accepted and never served
        self.flowing = threading.Event()
        self.flowing.set()
        self.pairs = []
        self.half_closed = set()
        self.seen = []          # what each connection's client has sent, the first KB
        self.lock = threading.Lock()
        self.open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open = False
        self.listener.close()
        self.flowing.set()
        self.cut()

    def stall(self):
        """Nothing passes any more; the connections stay."""
        self.flowing.clear()

    def resume(self):
        self.flowing.set()

    def cut(self, reset=False):
        """Ends every connection; with reset by RST instead of FIN."""
        with self.lock:
            pairs, self.pairs = self.pairs, []
        for pair in pairs:
            for end in pair:
                try:
                    if reset:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()

    def inject(self, data, to_client=True):
        """Puts bytes into every connection's stream, towards the client or the server."""
        with self.lock:
            for near, far in self.pairs:
                (near if to_client else far).sendall(data)

    def count(self):
        with self.lock:
            return len(self.pairs)

    def _accept(self):
        while self.open:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if self.refusing:
                near.close()
                continue
            if self.silent:
                with self.lock:
                    self.pairs.append((near, near))
                continue
            try:
                far = socket.create_connection(self.target, 5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (near, far)
            sent = bytearray()
            with self.lock:
                self.pairs.append(pair)
                self.seen.append(sent)
            for source, target, seen in ((near, far, sent), (far, near, None)):
                threading.Thread(target=self._relay, args=(source, target, pair, seen), daemon=True).start()

    def _relay(self, source, target, pair, seen):
        over = False
        try:
            while data := source.recv(65536):
                if seen is not None and len(seen) < 1024:
                    seen += data
                step = self.slice or len(data)
                for at in range(0, len(data), step):
                    self.flowing.wait()
                    if self.delay:
                        time.sleep(self.delay)
                    target.sendall(data[at:at + step])
            self.flowing.wait()
            target.shutdown(socket.SHUT_WR)  # the other direction goes on
        except OSError:
            over = True
        self.flowing.wait()
        with self.lock:
            over |= pair in self.half_closed
            self.half_closed.add(pair)
            if not over:
                return
            self.half_closed.discard(pair)
            if pair in self.pairs:
                self.pairs.remove(pair)
        for end in pair:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()
