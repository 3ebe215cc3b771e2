"""The page that a router serves to browsers: files in `static/`, ES modules without a build step.

Owns: the files with their ETags, and the content security policy, which forbids inline scripts and every assignment of
markup: a key, value or owner is always text. Libraries in `static/lib/` are as `manifest.json` says, each with its
licence and SHA-256. Leaves to others: what the page shows (`router/events.py`), and HTTP (`router/page.py`).
"""
