"""The metrics as Prometheus sees them: scraped by a real one, under every panel of the dashboard and every alert rule."""
import collections
import json
import re
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import psycopg
import pytest
import yaml

import harness
import wire
from harness import DATABASE, USER, poll, raw

CONF = harness.ROOT / "conf"
DASHBOARD = json.loads((CONF / "grafana/pgsidecar.json").read_text())
RULES = yaml.safe_load((CONF / "prometheus/pgsidecar.rules.yml").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] if panel["type"] != "row" for target in panel["targets"]]
NAME = re.compile(r"\b((?:pgsidecar|process)_[a-z_]+)\b")


def promtool(*arguments, **keys):
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, **keys)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Prometheus:
    """Scrapes one pgsidecar each half second with conf/prometheus' rules."""

    def __init__(self, proxy):
        self.port = harness.free_port()
        self.directory = tempfile.TemporaryDirectory(prefix="pgsidecar-prometheus-")
        name = self.directory.name
        config = yaml.safe_load((CONF / "prometheus/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        config["rule_files"] = [str(CONF / "prometheus" / file) for file in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{proxy.admin_port}"]
        with open(f"{name}/prometheus.yml", "w") as file:
            yaml.safe_dump(config, file)
        self.log = open(f"{name}/log", "wb")
        self.process = subprocess.Popen(["prometheus", f"--config.file={name}/prometheus.yml", f"--storage.tsdb.path={name}/data", f"--web.listen-address=127.0.0.1:{self.port}"],
                                        stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL, cwd=name)

    def get(self, path, **parameters):
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}")

    def ready(self):
        try:
            return self.get("targets")["activeTargets"][0]["health"] == "up"
        except (OSError, AssertionError, IndexError):
            assert self.process.poll() is None, open(self.log.name).read()
            return False

    def query(self, expression):
        return self.get("query", query=expression)["result"]

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        self.log.close()
        self.directory.cleanup()


def expanded(expression):
    """As Grafana would send it with all chosen."""
    for name in ("instance", "database", "job"):
        expression = expression.replace(f"${name}", ".*")
    return expression.replace("$__rate_interval", "10s")


@pytest.fixture(scope="module")
def scraped():
    """A Prometheus that has watched a proxy in every sort of trouble for a while."""
    with harness.Postgres() as pg:
        proxy = harness.make_proxy(pg, {"pool": {"max": 4, "connectionTimeoutMillis": 700, "idleInTransactionWarnMillis": 200},
                                        "alerts": {"clearSeconds": 1, "forSeconds": 1}, "limits": {"maxClients": 40}})
        prometheus = Prometheus(proxy)
        over = threading.Event()

        def load():
            """Queries, transactions, prepared statements, errors; then all connections taken, so that others wait in vain."""
            try:
                while not over.is_set():
                    with proxy.connect(application_name="load", prepare_threshold=0) as client:
                        for n in range(40):
                            client.execute("SELECT %s::int", [n])
                        with client.transaction():
                            client.execute("SELECT 1")
                        try:
                            client.execute("SELECT 1/0")
                        except psycopg.Error:
                            pass
                    try:
                        harness.Proxy.connect(proxy, password="wrong")
                    except psycopg.Error:
                        pass
                    proxy.http("/api/admin/reconnect", method="POST")
                    try:
                        with proxy.connect() as one, proxy.connect() as two, proxy.connect() as three:
                            for holder in (one, two):
                                holder.execute("BEGIN")
                                holder.execute("SELECT 1")
                            three.execute("SELECT 1")
                    except psycopg.Error:
                        pass
            except Exception as error:  # pylint: disable=broad-except
                load.error = error
                raise
        load.error = None
        leaker, keeper = proxy.connect(application_name="cron"), proxy.connect(application_name="locks")
        thread = threading.Thread(target=load, daemon=True)
        try:
            poll(prometheus.ready, 30, "Prometheus scrapes")
            leaker.execute("BEGIN")
            leaker.execute("SELECT 1")
            keeper.execute("SELECT pg_advisory_lock(1)")
            thread.start()
            time.sleep(12)
            yield proxy, prometheus
        finally:
            over.set()
            if thread.ident:
                thread.join(20)
            leaker.close()
            keeper.close()
            prometheus.close()
            proxy.close()
            assert load.error is None


def test_the_files_are_in_order():
    directory = CONF / "prometheus"
    promtool("check", "config", directory / "prometheus.yml")
    assert "SUCCESS" in promtool("test", "rules", directory / "pgsidecar.rules.test.yml", cwd=directory)
    tested = {test["alert_rule_test"][0]["alertname"] for test in yaml.safe_load((directory / "pgsidecar.rules.test.yml").read_text())["tests"]}
    assert tested == {rule["alert"] for group in RULES["groups"] for rule in group["rules"]}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in DASHBOARD["panels"] for target in panel.get("targets", []))


def test_both_formats_pass_and_tell_the_same(scraped):
    proxy, _ = scraped
    plain = proxy.http("/metrics")[2]
    promtool("check", "metrics", input=plain)
    opened = proxy.http("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})[2]
    assert opened.endswith("# EOF\n")

    def names(text):
        return {re.match(r"[a-z_]+(\{.*?\})?(?= )", line)[0] for line in text.splitlines() if not line.startswith("#")}
    assert names(plain) == names(opened)


def test_a_real_prometheus_takes_every_sample(scraped):
    proxy, prometheus = scraped
    target = prometheus.get("targets")["activeTargets"][0]
    assert target["health"] == "up" and target["lastError"] == ""
    [lost] = prometheus.query("scrape_samples_scraped - scrape_samples_post_metric_relabeling")
    [count] = prometheus.query("scrape_samples_scraped")
    lines = [line for line in proxy.http("/metrics")[2].splitlines() if not line.startswith("#")]
    assert float(lost["value"][1]) == 0 and abs(float(count["value"][1]) - len(lines)) < 20
    types = {name: entry[0]["type"] for name, entry in prometheus.get("metadata").items()}
    assert types["pgsidecar_query_seconds"] == "histogram" and types["pgsidecar_pool_max_connections"] == "gauge"
    [info] = prometheus.query("pgsidecar_build_info")
    assert re.fullmatch(r"[0-9a-f]{7,40}|unknown", info["metric"]["commit"]) and info["metric"]["version"] and info["metric"]["openssl"]


@pytest.mark.parametrize("title, expression", QUERIES, ids=[f"{title}-{index}" for index, (title, _) in enumerate(QUERIES)])
def test_each_panel_has_data(scraped, title, expression):
    result = scraped[1].query(expanded(expression))
    assert result, (title, expanded(expression))
    assert all(sample["value"][1] not in ("NaN", "+Inf") for sample in result), result


def test_panels_see_the_trouble(scraped):
    """From the dashboard's queries alone: who leaks, who keeps a connection, that clients wait in vain."""
    _, prometheus = scraped

    def of(title):
        return [sample for wanted, expression in QUERIES if wanted == title for sample in prometheus.query(expanded(expression))]
    [leak] = [sample for sample in of("Leaked transactions") if "application" in sample["metric"]]
    assert leak["metric"]["application"] == "cron" and leak["metric"]["user"] == harness.USER and float(leak["value"][1]) > 5
    [kept] = [sample for sample in of("Connections that clients keep") if sample["metric"]["reason"] == "advisory_lock"]
    assert float(kept["value"][1]) == 1
    assert sum(float(sample["value"][1]) for sample in of("Clients refused") if sample["metric"]["reason"] == "auth") > 0
    assert [sample for sample in of("Errors by SQLSTATE class") if sample["metric"]["sqlstate_class"] == "22" and float(sample["value"][1]) > 0]
    handshakes = prometheus.query("pgsidecar_server_tls_handshake_seconds_count")
    assert float(handshakes[0]["value"][1]) >= 4


def test_rules_and_dashboard_name_series_that_there_are(scraped):
    proxy, prometheus = scraped
    known = set(prometheus.get("label/__name__/values"))
    rules = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    for expression in rules + variables + [expression for _, expression in QUERIES]:
        for name in NAME.findall(re.sub(r'"[^"]*"', "", expression)):
            assert name in known, (name, expression)
    groups = prometheus.get("rules")["groups"]
    assert groups and all(rule["health"] == "ok" for group in groups for rule in group["rules"]), groups


def test_the_readme_names_every_series(scraped):
    proxy, _ = scraped
    text = (harness.ROOT / "README.md").read_text()
    families = set(re.findall(r"^# TYPE (\S+)", proxy.http("/metrics")[2], re.M))
    assert not {name for name in families if not name.startswith("process_") and name not in text}


def test_metrics_stay_readable_while_draining(proxies):
    proxy = proxies()
    with proxy.connect() as client:
        client.execute("BEGIN")
        client.execute("SELECT 1")
        proxy.http("/api/admin/drain", method="POST")
        poll(lambda: "\npgsidecar_draining 1\n" in proxy.http("/metrics")[2])
        promtool("check", "metrics", input=proxy.http("/metrics")[2])
        client.execute("COMMIT")


def test_errors_are_counted_that_clients_were_told(proxies, pg):
    """Once each: not what the proxy asks for itself, nor what befalls a server connection that nobody uses."""
    proxy = proxies()
    told = collections.Counter()

    def ask(w, *frames):
        done = w.ask(*frames)
        told.update(m.error["C"][:2] for m in done if m.type == "E")
        return done

    def counted():
        samples = re.findall(r'^pgsidecar_errors_total\{sqlstate_class="(..)"\} (\d+)', proxy.http("/metrics")[2], re.M)
        return {klass: int(count) for klass, count in samples}

    def lose(losses):
        pg.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
        poll(lambda: proxy.log_text().count(": lost: ") == losses, what="it is lost")

    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        lose(1)
        assert counted() == told == {}
        assert w.value("BEGIN; SELECT 1") == "1"
        lose(2)
        assert counted() == told == {}
        for sql in ("SELECT 1", "SELECT 2", "ROLLBACK"):
            ask(w, wire.query(sql))
        assert counted() == told == {"57": 1, "25": 1}
        w.send(wire.query("SELECT pg_sleep(600)"))
        poll(lambda: pg.count("query = 'SELECT pg_sleep(600)' AND state = 'active'") == 1)
        lose(3)
        told.update(m.error["C"][:2] for m in w.until() if m.type == "E")
        assert counted() == told == {"57": 2, "25": 1}
        ask(w, wire.query("SELECT lastval()"))
        for value in range(5):
            ask(w, wire.query(f"SET app.counted = '{value}'"))
        ask(w, wire.parse("SELECT no_such_column", "s"), wire.SYNC)
        ask(w, wire.parse("SELECT $1::int", "t"), wire.SYNC)
        ask(w, wire.bind("t", ["x"]), wire.execute(), wire.SYNC)
        ask(w, wire.bind("t", []), wire.execute(), wire.SYNC)
        ask(w, wire.query("EXECUTE no_such_statement"))
        refused = wire.wire_error(proxy.port, False, USER, "wrong", DATABASE)
        told.update([refused["C"][:2]])
        assert sum(told.values()) == 9, told
        assert counted() == told
