"""How figures are drawn: matplotlib, as inline SVG that takes its colours and its font from the page.

Drawn small (about 300 points wide), so that text stays readable at the width of a phone. Text stays text. Colours are
drawn as stand-ins and become CSS variables, so that one drawing serves light, dark and paper.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, RULE, MARK = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050501", "#050502", "#050503", "#050504", "#050505")
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", MARK: "--mark"} | {
    color: f"--series-{i}" for i, color in enumerate(SERIES, start=1)
}
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))  # so that lines differ on grey paper too
MARKERS = "osD^v"
WIDTH = 3.9  # inches
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trimtab",  # the same figure twice gives the same bytes
    "text.parse_math": False,  # a run may be called a$b$
    "text.color": INK,
    "font.family": "DejaVu Sans",  # comes with matplotlib; only measures, the page brings the font that is seen
    "font.size": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    caption: str  # what to look at


def svg(draw: Callable[[Figure], None], name: str, height: float, alt: str) -> Markup:
    """The drawing that `draw` puts on an empty figure, `height` inches high; `name` keeps its ids apart from others."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        draw(figure)
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    return Markup(_adopt(text[text.index("<svg") :], name, alt))


def _adopt(text: str, name: str, alt: str) -> str:
    """A file of its own becomes part of the page: ids, colours, size and a description for those who can't see it."""
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
