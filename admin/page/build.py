#!/usr/bin/env python3
"""Makes one HTML file of index.html, the styles and scripts that it names and Chart.js, and of that a C++ source with its bytes.

usage: build.py CHART_JS OUTPUT_CPP
"""
import base64
import gzip
import hashlib
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
POLICY = ("default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src data:; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'")
CPP = """// Made by admin/page/build.py.
#include "admin/page.hpp"

namespace pgsidecar::admin {{
namespace {{
constexpr unsigned char kBytes[] = {{
{bytes}}};
}}
const EmbeddedPage kPage{{{{reinterpret_cast<const char*>(kBytes), sizeof kBytes}},
                         {size},
                         R"({etag})",
                         "{policy}"}};
}}  // namespace pgsidecar::admin
"""


def inline(library):
    """The whole page, and the hashes that its policy allows."""
    hashes = {"script": [], "style": []}

    def put(tag, name):
        file = library if name == "chart.js" else HERE / name
        text = file.read_text()
        if f"</{tag}" in text.lower():
            raise SystemExit(f"{file}: can't be put between <{tag}> and </{tag}>")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag].append(f"'sha256-{digest}'")
        return f"<{tag}>{text}</{tag}>"

    html = (HERE / "index.html").read_text()
    html = re.sub(r'<link rel="stylesheet" href="([\w.]+)">', lambda m: put("style", m[1]), html)
    html = re.sub(r'<script src="([\w.]+)"></script>', lambda m: put("script", m[1]), html)
    return html.encode(), POLICY.format(scripts=" ".join(hashes["script"]), styles=" ".join(hashes["style"]))


def main():
    library, output = map(pathlib.Path, sys.argv[1:])
    html, policy = inline(library)
    packed = gzip.compress(html, 9, mtime=0)
    rows = [",".join(map(str, packed[at:at + 32])) for at in range(0, len(packed), 32)]
    etag = f'"{hashlib.sha256(html + policy.encode()).hexdigest()[:20]}"'
    output.write_text(CPP.format(bytes="".join(row + ",\n" for row in rows), size=len(html), etag=etag, policy=policy))


if __name__ == "__main__":
    main()
