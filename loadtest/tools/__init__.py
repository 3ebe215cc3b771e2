"""What load tests and documents need beside a cluster: pages, charts and pictures, real data and its comparison.

`charts` and `web_page` draw SVG and HTML; `pictures` draws those of the documents.
`debian_index` makes import lines of real data, `verify` reads them back.
"""
