"""The page's files: what a router serves at `/` to a browser and below `/page/`, from this package.

Owns: the files in `static`, the two documents that the page links to, their media types and entity tags; the policy
that a browser applies to the page.
Promises: read once, at the first request; no name leaves the folder, because only names that were found are known.
The libraries in `static/lib` are whole files of their releases, as `static/lib/manifest.json` names them.
Leaves to others: HTTP (`router.routes.page`), what the scripts call (the router's public API, nothing else).
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

STATIC = Path(__file__).parent / "static"
DOCUMENTS = {f"docs/{name}": STATIC.parent.parent / name for name in ("API.md", "DESIGN.md")}
INDEX = "index.html"
BYTES_MAX = 300_000  # of all files together

# Only from here, no inline script or style, no text that becomes markup: `require-trusted-types-for` without a policy
# turns every assignment to innerHTML into an error, so a key such as <script> cannot be anything but text.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".LICENSE": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",  # which browsers show, and do not save
}


class StaticFile(NamedTuple):
    """`etag` is quoted."""

    body: bytes
    media_type: str
    etag: str


@functools.cache
def static_files() -> dict[str, StaticFile]:
    """By name, such as `app.js`, `lib/uplot.js` and `docs/API.md`."""
    paths = {path.relative_to(STATIC).as_posix(): path for path in sorted(STATIC.rglob("*")) if path.is_file()}
    found = {}
    for name, path in (paths | DOCUMENTS).items():
        if media_type := _TYPES.get(path.suffix):
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            found[name] = StaticFile(body, media_type, etag)
    return found
