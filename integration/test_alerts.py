"""Alerts as they begin and end: at the API, in the log, in the metrics, at webhooks that work and that fail, at a real Alertmanager."""
import http.server
import json
import re
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.request

import pytest

import harness
from harness import poll

FAST = {"alerts": {"forSeconds": 1, "clearSeconds": 1, "waitingSeconds": 2}}


class Receiver:
    """An HTTP server that keeps what it is sent. `answers`: statuses given before 200."""

    def __init__(self, answers=(), tls=None):
        self.bodies, self.headers, self.answers = [], [], list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                status = self.answers.pop(0) if self.answers else 200
                if status == 0:  # hangs up
                    return
                if status == 200:
                    self.bodies.append(json.loads(body))
                    self.headers.append((handler.path, dict(handler.headers)))
                handler.send_response(status)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            def log_message(handler, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def told(self, name):
        """The statuses that it heard of an alert."""
        return [body["status"] for body in self.bodies if body["alert"]["name"] == name]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def settings(webhooks=None, **more):
    return harness.merge(harness.merge(FAST, {"alerts": {"webhooks": webhooks}} if webhooks else {}), more)


def alerts(proxy, name):
    status, document = proxy.json("/api/monitoring/alerts")
    assert status == 200
    return [alert for alert in document["active"] if alert["name"] == name], [alert for alert in document["recent"] if alert["name"] == name]


def webhook(proxy, name):
    [found] = [hook for hook in proxy.json("/api/monitoring/alerts")[1]["webhooks"] if hook["name"] == name]
    return found


def metric(proxy, name):
    return float(re.search(rf'^pgsidecar_alert_active{{alert="{name}"}} (\S+)$', proxy.http("/metrics")[2], re.M)[1])


def wait_for(thread_work):
    thread = threading.Thread(target=thread_work, daemon=True)
    thread.start()
    return thread


def test_pressure_begins_and_ends_everywhere(proxies):
    with Receiver() as receiver:
        proxy = proxies(settings({"ops": {"url": receiver.url + "/hook?x=1", "authorization": "Bearer t0ken"}}, pool={"max": 1, "connectionTimeoutMillis": 60000}))
        with proxy.connect() as holder, proxy.connect() as waiter:
            holder.execute("BEGIN")
            holder.execute("SELECT 1")
            waiting = wait_for(lambda: waiter.execute("SELECT 1"))
            [alert] = poll(lambda: alerts(proxy, "pool_pressure")[0])
            assert alert["severity"] == "warning" and alert["labels"] == {"database": harness.DATABASE, "user": harness.USER} and alert["ended"] is None
            assert re.match(r"1 client waits for one of app@app's 1 server connections, the first for \d", alert["summary"])
            assert metric(proxy, "pool_pressure") == 1
            assert [a["name"] for a in proxy.stats()["alerts"] if a["name"] == "pool_pressure"]
            poll(lambda: receiver.told("pool_pressure") == ["firing"])
            holder.execute("COMMIT")
            waiting.join(10)
        poll(lambda: not alerts(proxy, "pool_pressure")[0])
        [over] = alerts(proxy, "pool_pressure")[1]
        assert over["ended"] > over["since"] and metric(proxy, "pool_pressure") == 0
        poll(lambda: receiver.told("pool_pressure") == ["firing", "resolved"])
        path, headers = receiver.headers[0]
        assert path == "/hook?x=1" and headers["Authorization"] == "Bearer t0ken" and headers["Content-Type"] == "application/json"
        log = proxy.log_text()
        assert re.search(r"warn \[alert\] alert pool_pressure \(warning\): 1 client waits", log) and "info [alert_ended] alert pool_pressure ended: " in log
        config = proxy.http("/api/monitoring/config")[2]
        assert "t0ken" not in config + log and receiver.url not in config  # both may be secrets


def test_a_leak_names_its_application(proxies):
    with Receiver() as receiver:
        proxy = proxies(settings({"chat": {"url": receiver.url, "format": "slack"}}, pool={"idleInTransactionWarnMillis": 300}))
        with proxy.connect(application_name="cron") as leaker:
            leaker.execute("BEGIN")
            leaker.execute("SELECT 1")
            poll(lambda: [body for body in receiver.bodies if re.search(r':warning: \*\[warning\] leaked_transactions\* on .*by application "cron"', body["text"])])
            assert 'pgsidecar_oldest_leak_seconds{database="app",user="app",application="cron"}' in proxy.http("/metrics")[2]
            leaker.execute("ROLLBACK")
        poll(lambda: [body for body in receiver.bodies if ":white_check_mark: *[resolved] leaked_transactions*" in body["text"]])


def test_an_unreachable_database(proxies):
    with harness.Postgres() as server:
        proxy = proxies(settings(), server=server)
        with proxy.connect() as client:
            client.execute("SELECT 1")
        server.stop()
        with pytest.raises(Exception):
            with proxy.connect() as client:
                client.execute("SELECT 1")
        [alert] = poll(lambda: alerts(proxy, "database_unreachable")[0])
        assert alert["severity"] == "critical" and "refused" in alert["summary"] and str(server.port) in alert["labels"]["upstream"]
        server.start()
        with proxy.connect() as client:
            client.execute("SELECT 1")
        poll(lambda: not alerts(proxy, "database_unreachable")[0])


def test_a_failing_receiver_is_tried_again_and_holds_up_no_other(proxies, pg):
    with Receiver(answers=[503, 0, 429]) as failing, Receiver(answers=[400]) as refusing, Receiver() as working:
        hooks = {"failing": {"url": failing.url}, "refusing": {"url": refusing.url}, "working": {"url": working.url},
                 "away": {"url": f"http://127.0.0.1:{harness.free_port()}"}, "unknown": {"url": "http://no-such-host.invalid/"}}
        proxy = proxies(settings(hooks, pool={"idleInTransactionWarnMillis": 300}))
        with proxy.connect() as leaker:
            leaker.execute("BEGIN")
            leaker.execute("SELECT 1")
            poll(lambda: working.told("leaked_transactions") == ["firing"])
            poll(lambda: failing.told("leaked_transactions") == ["firing"], 20)
            leaker.execute("ROLLBACK")
        poll(lambda: failing.told("leaked_transactions") == ["firing", "resolved"], 20)
        poll(lambda: refusing.told("leaked_transactions") == ["resolved"])  # a 400 isn't tried again
        hook = webhook(proxy, "failing")
        assert (hook["delivered"], hook["retried"], hook["dropped"], hook["queued"], hook["lastError"]) == (2, 3, 0, 0, None)
        assert webhook(proxy, "refusing")["dropped"] == 1
        assert webhook(proxy, "away")["queued"] == 2 and "refused" in webhook(proxy, "away")["lastError"]
        assert webhook(proxy, "unknown")["lastError"].startswith("cannot resolve")
        log = proxy.log_text()
        assert log.count("webhook failing: answered 503; tried again") == 1 and "webhook failing: works again" in log
        assert "webhook refusing: dropped an alert: answered 400" in log
        began = time.monotonic()
        assert proxy.stop() == 0 and time.monotonic() - began < 2  # what couldn't be told holds up nothing


def test_tls_to_a_receiver(proxies, tmp_path):
    harness.make_certificates(tmp_path)
    with Receiver(tls=(tmp_path / "server.crt", tmp_path / "server.key")) as receiver:
        proxy = proxies(settings({"good": {"url": receiver.url, "ca": str(tmp_path / "ca.crt")}, "strange": {"url": receiver.url}}, pool={"idleInTransactionWarnMillis": 300}))
        with proxy.connect() as leaker:
            leaker.execute("BEGIN")
            leaker.execute("SELECT 1")
            poll(lambda: receiver.told("leaked_transactions") == ["firing"])
            poll(lambda: "certificate" in (webhook(proxy, "strange")["lastError"] or ""))  # its CA isn't the system's


def test_certificates_near_their_end(proxies, tmp_path):
    harness.make_certificates(tmp_path)
    proxy = proxies({"alerts": {"certificateDays": 100000}, "tls": {"mode": "allow", "certificate": str(tmp_path / "server.crt"), "key": str(tmp_path / "server.key")}})
    with proxy.connect() as client:
        client.execute("SELECT 1")
        found = poll(lambda: len(alerts(proxy, "certificate_expiry")[0]) == 2 and alerts(proxy, "certificate_expiry")[0])
    labels = {alert["labels"]["certificate"] for alert in found}
    assert labels == {"tls.certificate", f"127.0.0.1:{proxy.pg.port}"}
    assert all(re.search(r"expires in \d+", alert["summary"]) for alert in found)


def test_a_stuck_drain(proxies):
    proxy = proxies({"alerts": {"drainSeconds": 1}, "shutdown": {"timeoutMillis": 6000}})
    proxy.expect_exit = 3
    with proxy.connect() as client:
        client.execute("BEGIN")
        client.execute("SELECT 1")
        proxy.http("/api/admin/drain", method="POST")
        [alert] = poll(lambda: alerts(proxy, "drain_stuck")[0])
        assert alert["severity"] == "critical" and "still waits for 1 client" in alert["summary"]
        assert metric(proxy, "drain_stuck") == 1  # while draining too


def test_a_reload_changes_thresholds_and_webhooks(proxies):
    with Receiver() as receiver:
        proxy = proxies({"alerts": {"memoryMb": 0, "forSeconds": 0, "clearSeconds": 0}})
        with proxy.connect() as client:
            client.execute("SELECT 1")
        proxy.write_config(harness.merge(proxy.config, {"alerts": {"memoryMb": 1, "webhooks": {"ops": {"url": receiver.url}}}}))
        proxy.http("/api/admin/reload", method="POST")
        for key in ("alerts.memoryMb", "alerts.webhooks"):
            poll(lambda: f"reload: {key} changed" in proxy.log_text())
        with proxy.connect() as client:
            client.execute("SELECT 1")
            poll(lambda: receiver.told("high_memory") == ["firing"])
            proxy.write_config(harness.merge(proxy.config, {"alerts": {"enabled": False}}))
            proxy.http("/api/admin/reload", method="POST")
            poll(lambda: receiver.told("high_memory") == ["firing", "resolved"])


def test_mistakes_in_the_configuration(proxy):
    proxy.config_file.write_text(proxy.config_file.read_text() + """
alerts:
  webhooks:
    one: {url: "ftp://x"}
    two: {format: slack}
    three: {url: "http://u:secret@x/", fromat: json}
    four: {url: "http://x", format: pager, ca: /no/such/file}
    five: {url: "${file:/no/such/file}"}
""")
    done = proxy.command("check", "--config", proxy.config_file)
    assert done.returncode == 2
    for text in ("alerts.webhooks.one.url: begins with neither http:// nor https://", "alerts.webhooks.two: needs a url", "give them as authorization",
                 'alerts.webhooks.three.fromat: unknown key (did you mean "format"?)', '"pager" is none of: json, alertmanager, slack', "/no/such/file", "alerts.webhooks.five.url"):
        assert text in done.stderr, (text, done.stderr)
    assert "secret" not in done.stderr


def test_a_real_alertmanager(proxies):
    """Debian's Alertmanager hears of an alert, groups it by our labels and hears of its end."""
    port, directory = harness.free_port(), tempfile.TemporaryDirectory(prefix="pgsidecar-am-")
    with directory as name, open(f"{name}/log", "wb") as log:
        with open(f"{name}/config.yml", "w") as config:
            config.write("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
        manager = subprocess.Popen(["prometheus-alertmanager", f"--config.file={name}/config.yml", f"--storage.path={name}/data", "--cluster.listen-address=",
                                    f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log, stdin=subprocess.DEVNULL)

        def heard():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/alerts", timeout=5) as answer:
                    return {alert["labels"]["alertname"]: alert for alert in json.load(answer)}
            except OSError:
                assert manager.poll() is None, open(f"{name}/log").read()
                return None
        try:
            poll(lambda: heard() is not None, 20, "Alertmanager answers")
            proxy = proxies(settings({"am": {"url": f"http://127.0.0.1:{port}/", "format": "alertmanager"}}, pool={"idleInTransactionWarnMillis": 300}))
            with proxy.connect(application_name="cron") as leaker:
                leaker.execute("BEGIN")
                leaker.execute("SELECT 1")
                alert = poll(lambda: heard().get("pgsidecar_leaked_transactions"))
                assert alert["labels"]["database"] == harness.DATABASE and alert["labels"]["severity"] == "warning" and alert["status"]["state"] == "active"
                assert 'by application "cron"' in alert["annotations"]["summary"]
                leaker.execute("ROLLBACK")
            poll(lambda: "pgsidecar_leaked_transactions" not in heard())  # resolved ones aren't listed
            assert webhook(proxy, "am")["delivered"] == 2
        finally:
            manager.terminate()
            manager.wait(10)
