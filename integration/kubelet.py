"""The kubelet's part in a pod's end, played on processes of this machine: who gets SIGTERM when, who gets SIGKILL, and the liveness probe
that goes on meanwhile. After KEP-753 (native sidecars): the application is told first; a sidecar when the last application container is
gone; what the grace period has left is shared, and at least 2 s are between a sidecar's SIGTERM and its SIGKILL.
"""
import signal
import subprocess
import threading
import time

LEAST_SECONDS = 2.0


class Liveness:
    """GET /health/live as fast as it can; `failures` of it, and `ready` the statuses of /health/ready in turn."""

    def __init__(self, sidecar):
        self.sidecar, self.failures, self.answers, self.ready = sidecar, [], 0, []
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while not self.ended.is_set():
            try:
                status = self.sidecar.http("/health/live", timeout=5)[0]
                ready = self.sidecar.http("/health/ready", timeout=5)[0]
            except OSError as error:
                self.ended.wait(0.5)  # its end, which the probe has come upon?
                if self.sidecar.running():
                    self.failures.append(repr(error))
                return
            self.answers += 1
            if status != 200:
                self.failures.append(status)
            if ready not in self.ready[-1:]:
                self.ready.append(ready)
            self.ended.wait(0.02)

    def stop(self):
        self.ended.set()
        self.thread.join()


class Pod:
    """A sidecar (harness.Proxy) and an application (Popen). terminate() ends both; then `codes`, who was `killed`, and `lag`: how long the
    sidecar lived on after the application's end, in seconds."""

    def __init__(self, sidecar, application):
        self.sidecar, self.application = sidecar, application
        self.killed, self.codes, self.lag = [], {}, None
        self.liveness = Liveness(sidecar)

    def terminate(self, grace, native=True):
        began = time.monotonic()

        def left():
            return grace - (time.monotonic() - began)

        self.application.send_signal(signal.SIGTERM)
        if not native:
            self.sidecar.signal(signal.SIGTERM)
        self._end("application", self.application, left())
        gone = time.monotonic()
        if native:
            self.sidecar.signal(signal.SIGTERM)
        self._end("sidecar", self.sidecar.process, max(left(), LEAST_SECONDS if native else 0))
        self.lag = time.monotonic() - gone
        self.liveness.stop()

    def _end(self, name, process, seconds):
        try:
            process.wait(max(0, seconds))
        except subprocess.TimeoutExpired:
            self.killed.append(name)
            process.kill()
            process.wait()
        self.codes[name] = process.returncode
