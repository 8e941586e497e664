"""The page in a real browser, in front of a proxy that works."""
import re
import threading
import time

import psycopg
import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import browser
import harness
from harness import poll


@pytest.fixture(scope="module")
def chromium():
    driver = browser.chromium()
    yield driver
    driver.quit()


@pytest.fixture
def page(proxies, chromium):
    """open(config) -> (proxy, Page)"""
    def start(config=None, **keys):
        proxy = proxies(harness.merge({"alerts": {"forSeconds": 1, "clearSeconds": 1}, "pool": {"max": 3}}, config or {}), **keys)
        return proxy, Page(chromium, proxy)
    yield start
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.get("about:blank")


class Page:
    def __init__(self, driver, proxy):
        self.driver = driver
        driver.get_log("browser")
        driver.get(f"http://127.0.0.1:{proxy.admin_port}/")
        poll(lambda: self.text("state") != "connecting")

    def find(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, name):
        return self.driver.find_element(By.ID, name).text

    def facts(self):
        return dict(self.driver.execute_script("return [...document.querySelectorAll('#facts div')].map(d => [d.children[0].textContent, d.children[1].textContent])"))

    def rows(self, within):
        """Rows of a table as {column: text}."""
        return self.driver.execute_script("""
            const table = document.querySelector(arguments[0] + ' table');
            if (!table || table.offsetParent === null) return [];
            const names = [...table.querySelectorAll('thead th')].map((th) => th.textContent.replace(/[▾▴\\s]+$/, '').trim());
            return [...table.querySelectorAll('tbody tr')].map((tr) => Object.fromEntries([...tr.children].map((td, i) => [names[i], td.textContent])));
            """, within)

    def tab(self, name):
        self.driver.find_element(By.ID, f"tab-{name}").click()

    def click(self, within, label):
        """The first button of that name that can be pressed."""
        def press():
            try:
                for button in self.find(f"{within} button"):
                    if button.text == label and button.is_enabled():
                        button.click()
                        return True
            except StaleElementReferenceException:
                pass
            return False
        poll(press, what=f"a button {label}")

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if "net::ERR_" not in entry["message"]]

    def overflow(self):
        return self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


def running(connection, sql):
    def work():
        try:
            connection.execute(sql)
        except psycopg.Error as error:
            thread.error = error
    thread = threading.Thread(target=work, daemon=True)
    thread.error = None
    thread.start()
    return thread


def test_values_are_the_apis_under_load(page):
    proxy, shown = page()
    over = threading.Event()

    def load(number):
        with proxy.connect(application_name=f"web-{number}") as client:
            while not over.is_set():
                client.execute("SELECT count(*) FROM generate_series(1, %s)", [1000])
                time.sleep(0.005)
    threads = [threading.Thread(target=load, args=(number,), daemon=True) for number in range(5)]
    for thread in threads:
        thread.start()
    try:
        poll(lambda: {f"web-{n}" for n in range(5)} == {row["application"] for row in shown.rows("#clients")})
        stats = proxy.stats()
        [pool] = poll(lambda: shown.rows("#pools"))
        assert pool["database / user"] == "app / app" and re.match(r"[0-3] active, [0-3] idle of 3", pool["server connections"]), pool
        assert shown.facts()["clients"] == "5 of 1,000" and shown.facts()["servers"].endswith("of 3")
        poll(lambda: shown.facts()["transactions"] not in ("–/s", "0/s"))
        by_id = {str(row["id"]): row for row in proxy.json("/api/monitoring/clients")[1]["clients"]}
        assert {row["client"]: (row["application"], row["from"]) for row in shown.rows("#clients")} == {key: (row["application"], row["peer"]) for key, row in by_id.items()}
        shown.tab("statements")
        [statement] = poll(lambda: [row for row in shown.rows("#statements") if "generate_series" in row["statement"]])
        assert "?" in statement["statement"] and int(statement["calls"].replace(",", "")) >= stats["query"]["count"] / 4
        # What is drawn is what the history has.
        drawn = poll(lambda: shown.driver.execute_script("return Object.values(Chart.instances).map((c) => [c.data.datasets[0].label, c.data.datasets[0].data.length])"))
        assert len(drawn) == 6 and all(length > 0 for _, length in drawn), drawn
        for name in ("1 hour", "1 day", "5 minutes"):
            shown.click("#windows", name)
    finally:
        over.set()
        for thread in threads:
            thread.join(10)
    poll(lambda: shown.facts()["clients"].startswith("0 of"))
    # At rest: numbers that stay are the API's to the digit.
    shown.tab("statements")
    calls = {row["statement"]: row["calls"] for row in proxy.json("/api/monitoring/queries")[1]["queries"]}
    poll(lambda: {row["statement"]: int(row["calls"].replace(",", "")) for row in shown.rows("#statements")} == calls)
    assert shown.complaints() == []


def test_an_alert_appears_and_goes(page):
    proxy, shown = page({"pool": {"idleInTransactionWarnMillis": 300}})
    with proxy.connect(application_name="cron") as leaker:
        leaker.execute("BEGIN")
        leaker.execute("SELECT 'secret'")
        poll(lambda: "leaked_transactions" in shown.text("alerts") and 'by application "cron"' in shown.text("alerts"))
        shown.tab("leaks")
        [leak] = poll(lambda: shown.rows("#leaks"))
        assert leak["application"] == "cron" and leak["last statement"] == "SELECT ?"
        shown.tab("alerts")
        [alert] = poll(lambda: shown.rows("#panels #alerts") or shown.rows("[id='alerts'][role='tabpanel']"))
        assert alert["alert"] == "leaked_transactions" and alert["ended"] == "active"
        leaker.execute("ROLLBACK")
        poll(lambda: shown.text("alerts") == "")
        poll(lambda: [row for row in shown.rows("[id='alerts'][role='tabpanel']") if row["ended"] != "active"])


def test_a_click_cancels_a_query_and_closes_a_client(page):
    proxy, shown = page()
    with proxy.connect(application_name="slow") as client:
        query = running(client, "SELECT pg_sleep(60)")
        poll(lambda: [row for row in shown.rows("#clients") if row["state"] == "active"])
        shown.click("#clients", "Cancel")
        poll(lambda: shown.driver.find_element(By.ID, "confirm").is_displayed())
        assert "slow" in shown.text("confirm-text") and shown.text("confirm-statement") == "SELECT pg_sleep(?)"
        shown.driver.find_element(By.ID, "confirm-no").click()
        time.sleep(0.2)
        assert query.is_alive()  # asked back, and left alone
        shown.click("#clients", "Cancel")
        shown.click("#confirm", "Cancel the statement")
        query.join(10)
        assert query.error.sqlstate == "57014"
        poll(lambda: "its statement was cancelled" in shown.text("told"))
        shown.click("#clients", "Close")
        shown.click("#confirm", "Close the client")
        poll(lambda: not shown.rows("#clients"))
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT 1")


def test_sorting_filtering_and_the_keyboard(page):
    proxy, shown = page()
    clients = [proxy.connect(application_name=name) for name in ("alpha", "beta", "gamma")]
    try:
        poll(lambda: len(shown.rows("#clients")) == 3)
        shown.find("#clients input")[0].send_keys("bet")
        poll(lambda: [row["application"] for row in shown.rows("#clients")] == ["beta"])
        shown.find("#clients input")[0].send_keys(Keys.BACKSPACE * 3)
        poll(lambda: len(shown.rows("#clients")) == 3)
        orders = set()
        for _ in range(2):
            shown.click("#clients thead", "application")
            orders.add(tuple(row["application"] for row in shown.rows("#clients")))
        assert orders == {("alpha", "beta", "gamma"), ("gamma", "beta", "alpha")}
        shown.driver.find_element(By.ID, "tab-clients").send_keys(Keys.ARROW_RIGHT)
        assert shown.driver.switch_to.active_element.get_attribute("id") == "tab-servers" and shown.driver.current_url.endswith("#servers")
        shown.driver.switch_to.active_element.send_keys(Keys.END)
        poll(lambda: "maxClients: 1000" in shown.text("configuration"))
        assert harness.PASSWORD not in shown.driver.page_source
        colours = set()
        for _ in range(3):
            shown.driver.find_element(By.ID, "theme").click()
            colours.add(shown.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2  # light and dark
    finally:
        for client in clients:
            client.close()


def test_it_fits_a_phone(page):
    proxy, shown = page()
    browser.phone(shown.driver)
    with proxy.connect(application_name="a" * 60) as client:
        client.execute("SELECT 1")
        client.execute("BEGIN")
        client.execute("SELECT " + ", ".join(f"'{n}' AS column_number_{n}" for n in range(60)))
        for tab in ("clients", "servers", "statements", "leaks", "pins", "alerts", "configuration"):
            shown.tab(tab)
            time.sleep(0.3)
            assert shown.overflow() <= 0, tab


def test_what_clients_say_stays_text(page):
    proxy, shown = page()
    evil = "<img src=x onerror=document.title='owned'>"
    with proxy.connect(application_name=evil) as client:
        client.execute(f'SELECT 1 AS "{evil}"')
        poll(lambda: [row for row in shown.rows("#clients") if row["application"] == evil])
        shown.tab("statements")
        poll(lambda: [row for row in shown.rows("#statements") if evil in row["statement"]])
        assert not shown.find("img") and shown.driver.title == "pgsidecar"


def test_nothing_comes_from_elsewhere(page):
    proxy, shown = page()
    origin = f"http://127.0.0.1:{proxy.admin_port}/"
    names = shown.driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert names and all(name.startswith(origin) for name in names), names
    _, headers, _ = proxy.http("/", headers={"Accept": "text/html"})
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy, policy
    assert headers["ETag"] and proxy.http("/", headers={"Accept": "text/html", "If-None-Match": headers["ETag"]})[0] == 304


def test_it_is_readable_in_trouble(proxies, chromium, page):
    with harness.Postgres() as server:
        proxy, shown = page({"shutdown": {"timeoutMillis": 20000}, "databases": {}}, server=server)
        client = proxy.connect(application_name="last")
        client.execute("SELECT 1")
        server.stop()
        with pytest.raises(psycopg.Error):
            client.execute("SELECT 1")
        poll(lambda: "The database can't be reached" in shown.text("notices") and "refused" in shown.text("notices"), 15)
        assert shown.text("state") == "unhealthy" and "unhealthy" in shown.driver.title
        server.start()
        client.close()
        client = proxy.connect(application_name="last")
        client.execute("BEGIN")
        client.execute("SELECT 1")
        poll(lambda: "can't be reached" not in shown.text("notices"), 15)
        proxy.http("/api/admin/drain", method="POST")
        poll(lambda: "Draining: new clients are refused, 1 client left, 1 of them in a transaction." in shown.text("notices"))
        poll(lambda: [row["application"] for row in shown.rows("#clients")] == ["last"])
        client.execute("COMMIT")
        client.close()
        assert proxy.wait_exit(10) == 0
        poll(lambda: "Connection lost" in shown.text("notices"))
        assert shown.rows("#pools")  # what was last known stays
