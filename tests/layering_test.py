#!/usr/bin/env python3
"""The layers, one way only: protocol <- conf <- pool <- proxy, admin. Fails on an include that points upward."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS = {"protocol": {"protocol"},
          "conf": {"conf"},
          "pool": {"pool", "protocol", "conf"},
          "proxy": {"proxy", "pool", "protocol", "conf"},
          "admin": {"admin", "pool", "conf"}}
IO = r"boost/(asio|beast)|sys/(socket|epoll)|netinet/|arpa/"
FORBIDDEN = {"protocol": rf"{IO}|spdlog|yaml-cpp|openssl/(ssl|bio)\.h|chrono",
             "conf": rf"{IO}|spdlog|openssl",
             "pool": rf"{IO}|spdlog|openssl|yaml-cpp",
             "proxy": r"boost/beast|yaml-cpp",
             "admin": r"yaml-cpp"}
COMPOSITION = {"proxy/main.cpp": {"admin"}}  # it alone joins admin and proxy
SOCKETS = {"conf/listen.cpp"}  # from a `listen` key to sockets, for proxy and admin both


def main():
    wrong, checked = [], 0
    for layer, allowed in LAYERS.items():
        for file in sorted((ROOT / layer).rglob("*.[ch]pp")):
            name = str(file.relative_to(ROOT))
            checked += 1
            for number, line in enumerate(file.read_text().splitlines(), 1):
                match = re.match(r'\s*#\s*include\s*["<]([^">]+)[">]', line)
                if not match:
                    continue
                header = match[1]
                folder = header.split("/")[0]
                if folder in LAYERS and folder not in allowed | COMPOSITION.get(name, set()):
                    wrong.append(f"{name}:{number}: {layer}/ must not include {header}")
                elif re.match(FORBIDDEN[layer], header) and name not in SOCKETS:
                    wrong.append(f"{name}:{number}: {layer}/ must not use {header}")
    print("\n".join(wrong) or f"{checked} files keep to their layers")
    return 1 if wrong or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
