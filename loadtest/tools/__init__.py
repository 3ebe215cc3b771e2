"""Pages and charts: `charts` draws SVG, `web_page` HTML.

The verdict of a chaos run is made of them.
"""
