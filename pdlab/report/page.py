"""A page of HTML and its parts: one file, nothing fetched; light or dark as the reader's system is."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_STYLE = """
:root{color-scheme:light dark;--ink:#22272e;--soft:#68707a;--line:#dde1e6;--page:#fff;--box:#f5f7f9;--good:#1d7d47;--bad:#c0352b}
@media (prefers-color-scheme:dark){
:root{--ink:#e2e6ea;--soft:#98a2ad;--line:#3a414a;--page:#15191e;--box:#1f252c;--good:#5fc78c;--bad:#f07a70}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1060px;padding:28px 20px 60px;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:25px;margin:0}h2{font-size:17px;margin:34px 0 10px}
p{margin:6px 0}.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:20px 0}
.tile{background:var(--box);border-radius:8px;padding:10px 14px}
.tile b{display:block;font-size:21px;line-height:1.3}.tile span{color:var(--soft);font-size:13px}
.verdict{background:var(--box);border-left:4px solid var(--bad);border-radius:0 8px 8px 0;padding:10px 14px}
.verdict.good{border-color:var(--good);color:inherit}
.warning{border-left:4px solid #d29a22;background:var(--box);padding:8px 14px;margin:6px 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:4px 12px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:13px}th:first-child,td:first-child,.text{text-align:left}
td.text+td.text{white-space:normal}
th button{all:unset;cursor:pointer;color:var(--soft);font-weight:600}th button:focus-visible{outline:2px solid var(--ink)}
th[aria-sort=ascending] button::after{content:" \\25b2"}th[aria-sort=descending] button::after{content:" \\25bc"}
tbody tr:hover{background:var(--box)}
.chart{min-height:300px;margin:10px 0}.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(400px,100%),1fr));gap:8px 26px}
#worst td{white-space:nowrap}#worst .scroll{max-height:460px;overflow:auto}#worst th{position:sticky;top:0;background:var(--page)}
td.best{color:var(--good);font-weight:600}
figure{margin:14px 0;overflow-x:auto}figure svg{width:100%;min-width:560px;height:auto;display:block}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0}.scroll+dl{margin-top:12px}dt{font-weight:600}dd{margin:0}
pre{background:var(--box);border-radius:8px;padding:14px;overflow-x:auto;font:13px/1.45 ui-monospace,monospace}
summary{cursor:pointer;font-weight:600}
@media (max-width:600px){body{padding:16px 12px 40px}dl{grid-template-columns:1fr}dd{margin-bottom:6px}
th,td{padding:4px 8px 4px 0;font-size:13px}}
"""


def page(title: str, body: Sequence[str]) -> str:
    """All of it, of parts that are HTML already."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escaped(title)} · pdlab</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1, marks: Sequence[Sequence[bool]] | None = None) -> str:
    """`text` columns are words, to the left; `marks` says which cells are the best."""

    def cell(kind: str, column: int, words: str, best: bool = False) -> str:
        names = " ".join(["text"] * (column < text) + ["best"] * best)
        return f'<{kind} class="{names}">{escaped(words)}</{kind}>' if names else f"<{kind}>{escaped(words)}</{kind}>"

    top = "".join(cell("th", k, words) for k, words in enumerate(head))
    lines = []
    for r, row in enumerate(rows):
        cells = (cell("td", k, words, marks[r][k] if marks else False) for k, words in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def definition_list(terms: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escaped(term)}</dt><dd>{escaped(meaning)}</dd>" for term, meaning in terms) + "</dl>"


def escaped(words: str) -> str:
    return html.escape(str(words))
