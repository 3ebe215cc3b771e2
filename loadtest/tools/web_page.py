"""One self-contained web page for a report: frame, style, tables.

Owns: escaping, the colours of light and dark, and what all reports look like.
Promises: nothing is fetched from anywhere and no script runs; what `text` has been given can never become markup; a
page is well-formed XML, too, so that a mistake in it is found by a parser. Pure.
Leaves to others: charts (charts.py), what a report says (chaos/page.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

SERIES = 8  # how many colours there are

_NO_TEXT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def text(content: object) -> str:
    """Any content as text of a page or of an attribute.
    Characters that no page may hold are shown as U+FFFD."""
    return escape(_NO_TEXT.sub("\ufffd", str(content)), quote=True)


def document(title: str, body: str) -> str:
    """A whole page. `body` is markup; `title` is plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(title)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def table(caption: str, titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """A table of plain texts; the columns whose titles are in `numbers` are flush right. `caption` may be empty."""

    def line(tag: str, fields: Sequence[str]) -> str:
        styles = (' class="number"' if title in numbers else "" for title in titles)
        cells = (f"<{tag}{style}>{text(field)}</{tag}>" for style, field in zip(styles, fields, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    lines = "\n".join(line("td", row) for row in rows)
    told = f"<caption>{text(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{told}<thead>{line("th", titles)}</thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )


def bullets(lines: Sequence[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>"


def _style() -> str:
    light = "".join(f"--series-{number}:{colour};" for number, colour in enumerate(_LIGHT))
    dark = "".join(f"--series-{number}:{colour};" for number, colour in enumerate(_DARK))
    series = "".join(
        f".series-{number}{{--colour:var(--series-{number});--dash:{_DASHES[number % len(_DASHES)]}}}\n"
        for number in range(SERIES)
    )
    return (
        f":root{{color-scheme:light dark;{_LIGHT_TONES}{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{_DARK_TONES}{dark}}}}}\n{_LAYOUT}{series}"
    )


# Each stands out from its background by a contrast of at least 3 to 1 (WCAG 2.2, 1.4.11); lines differ in their
# dashes, too, and areas stand in the order of the legend, for those who do not tell colours apart.
_LIGHT = ("#1f77c9", "#d2591a", "#118560", "#a24bb0", "#977500", "#0a839d", "#d12b6b", "#6b7380")
_DARK = ("#6cb2f5", "#ff9a5a", "#4cd3a5", "#d99be0", "#e0c04c", "#58cfe4", "#ff86ad", "#b4bac4")
_DASHES = ("none", "7 3", "2 3")
_LIGHT_TONES = (
    "--page:#ffffff;--ink:#1b1f24;--faint:#59616b;--rule:#d8dce1;--shade:#f4f5f7;--band:#eceef2;"
    "--good:#0a6b3d;--good-shade:#e6f4ec;--bad:#a8121f;--bad-shade:#fdecee;"
)
_DARK_TONES = (
    "--page:#14171b;--ink:#e6e9ed;--faint:#a0a8b2;--rule:#363c44;--shade:#1e2227;--band:#252a31;"
    "--good:#63d69a;--good-shade:#12301f;--bad:#ff8f98;--bad-shade:#3b161a;"
)
_LAYOUT = """\
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.4rem;line-height:1.3;margin:0 0 4px}
h2{font-size:1.15rem;margin:40px 0 8px}
p{margin:8px 0}
ul{padding-left:20px}
pre,code{font:13px/1.45 ui-monospace,monospace}
pre{background:var(--shade);border:1px solid var(--rule);border-radius:6px;padding:10px 12px;margin:8px 0;
white-space:pre-wrap;overflow-wrap:anywhere}
.verdict{border-left:6px solid;border-radius:4px;padding:14px 18px;margin:0 0 20px}
.verdict p{color:var(--ink)}
.passed{color:var(--good);background:var(--good-shade);border-color:var(--good)}
.failed{color:var(--bad);background:var(--bad-shade);border-color:var(--bad)}
.faint{color:var(--faint)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
caption{text-align:left;color:var(--faint);padding:0 0 6px}
th,td{text-align:left;vertical-align:top;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule)}
th{font-weight:600;white-space:nowrap}
td{overflow-wrap:break-word}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
summary{cursor:pointer;padding:4px 0}
figure{margin:20px 0 28px}
figcaption{font-weight:600}
figcaption span{display:block;font-weight:400;font-size:14px;color:var(--faint)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;padding:0;margin:6px 0;font-size:14px}
.legend svg{width:26px;height:10px;margin-right:6px;vertical-align:middle}
.chart{overflow-x:auto}
.chart svg{display:block;width:100%;min-width:640px;height:auto}
svg text{fill:var(--faint);font:12px system-ui,sans-serif}
svg .strong{fill:var(--ink);stroke:var(--page);stroke-width:3px;paint-order:stroke}
svg .title{fill:var(--ink);font-weight:600}
svg .end{text-anchor:end}
svg .middle{text-anchor:middle}
svg .rule{stroke:var(--rule);stroke-width:1}
svg .mark{stroke:var(--faint);stroke-width:1;stroke-dasharray:2 3}
svg .band{fill:var(--band)}
svg .line{fill:none;stroke:var(--colour);stroke-width:1.6;stroke-linejoin:round;stroke-dasharray:var(--dash)}
svg .dot,svg .bar{fill:var(--colour)}
svg .area{fill:var(--colour);stroke:var(--page);stroke-width:.6}
"""
