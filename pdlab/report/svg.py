"""A matplotlib figure on a page: inline SVG whose ink and grid are taken from the page's own colours."""

from __future__ import annotations

import io
import re

import matplotlib as mpl

from pdlab.report import look
from pdlab.report.page import escaped


def svg(figure: look.Picture, name: str, label: str) -> str:
    """The figure as inline SVG: ids of its own (several share a page), colours that follow the page, text as text."""
    buffer = io.StringIO()
    with mpl.rc_context({**look.STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    drawing = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawing).replace("xlink:href", "href")
    drawing = drawing.replace(look.INK, "var(--ink)").replace(look.GRID, "var(--line)")
    # Attributes do not know var(); only styles do.
    drawing = re.sub(r'(?<![\w-])(fill|stroke)="(var\(--\w+\))"', r'style="\1:\2"', drawing)
    return f'<figure role="img" aria-label="{escaped(label)}">{drawing}</figure>'
