#!/usr/bin/python3
"""Takes the README's picture of the page (admin/page/screenshot.webp): two applications under load, a leak, a lock that is kept."""
import base64
import sys
import threading
import time

import psycopg

import browser
import harness

TARGET = harness.ROOT / "admin/page/screenshot.webp"
SECONDS = int(sys.argv[1]) if len(sys.argv) > 1 else 280


def work(proxy, over, name, sql, pause, **who):
    with proxy.connect(application_name=name, **who) as client:
        while not over.is_set():
            try:
                client.execute(sql)
            except psycopg.Error:
                pass
            over.wait(pause)


def main():
    other = {"user": harness.OTHER_USER, "password": harness.OTHER_PASSWORD}
    with harness.Postgres() as pg:
        proxy = harness.make_proxy(pg, {"pool": {"max": 6, "idleInTransactionWarnMillis": 1000, "connectionTimeoutMillis": 0},
                                        "users": {harness.USER: {"password": harness.PASSWORD}, harness.OTHER_USER: {"password": harness.OTHER_PASSWORD}}})
        over = threading.Event()
        loads = [("shop-web", "SELECT count(*) FROM generate_series(1, 3000)", 0.004, {})] * 5
        loads += [("shop-api", "SELECT relname, relkind FROM pg_class WHERE relname IN ('a', 'b', 'c') ORDER BY relname", 0.02, {})] * 3
        loads += [("reports", "SELECT sum(n) FROM generate_series(1, 200000) AS t(n)", 0.4, other), ("shop-api", "SELECT no_such FROM pg_class", 0.5, {})]
        threads = [threading.Thread(target=work, args=(proxy, over, name, sql, pause), kwargs=who, daemon=True) for name, sql, pause, who in loads]
        leak, lock = proxy.connect(application_name="nightly-cron"), proxy.connect(application_name="migrator")
        driver = browser.chromium(1400, 1120)
        try:
            for thread in threads:
                thread.start()
            lock.execute("SELECT pg_advisory_lock(1)")
            time.sleep(max(SECONDS - 40, 0))
            leak.execute("BEGIN")
            leak.execute("SELECT 1")
            time.sleep(min(SECONDS, 32))
            driver.get(f"http://127.0.0.1:{proxy.admin_port}/")
            time.sleep(8)
            picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "webp", "quality": 90})
            TARGET.write_bytes(base64.b64decode(picture["data"]))
        finally:
            over.set()
            driver.quit()
            for thread in threads:
                thread.join(10)
            leak.close()
            lock.close()
            proxy.close()
    print(f"{TARGET.relative_to(harness.ROOT)}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
