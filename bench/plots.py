"""Inline SVG for the report. Colours and fonts come from the page's style sheet, so plots follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

BAR, GAP, LABEL, NOTE = 20, 12, 190, 215  # bar height, space between bars, space for names and for figures


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    note: str
    kind: str  # ours | peer | floor: a class of the style sheet
    low: float | None = None  # lower and upper quartile
    high: float | None = None
    first: float | None = None  # leading part of the bar, drawn darker


def element(name: str, text: str | None = None, **attributes: object) -> str:
    """One SVG element; `_` in an attribute's name stands for `-`, and class_ for class."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{f"{value:.2f}" if isinstance(value, float) else escape(str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}/>" if text is None else f"<{name}{written}>{escape(text)}</{name}>"


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg></div>"
    )


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values that cover [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [k * step for k in range(start, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Three significant digits, no exponent, thousands kept whole."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def size(count: int | None) -> str:
    """Bytes for a reader; a dash where nothing was measured."""
    if count is None:
        return "–"
    return f"{number(count / 2**20)} MiB" if count >= 2**20 else f"{number(count / 2**10)} KiB"


def shape_text(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def bars(title: str, unit: str, items: Sequence[Bar], width: int = 860, marker: tuple[float, str] | None = None) -> str:
    """Horizontal bars with quartile whiskers; `marker` is a dashed vertical line with a caption."""
    top = 24 if marker else 6
    bottom = top + len(items) * (BAR + GAP)
    reach = max([bar.high or bar.value for bar in items] + ([marker[0]] if marker else [])) or 1.0
    room = width - LABEL - NOTE

    def x(value: float) -> float:
        return LABEL + value / reach * room

    parts = []
    for tick in ticks(0, reach):
        parts.append(element("line", class_="grid", x1=x(tick), x2=x(tick), y1=top, y2=bottom))
        parts.append(element("text", f"{tick:,g}", class_="tick", x=x(tick), y=bottom + 15, text_anchor="middle"))
    parts.append(element("text", unit, class_="tick", x=width, y=bottom + 15, text_anchor="end"))
    if marker:
        value, caption = marker
        parts.append(element("line", class_="marker", x1=x(value), x2=x(value), y1=top - 6, y2=bottom))
        parts.append(element("text", caption, class_="caption", x=x(value), y=top - 11))
    for i, bar in enumerate(items):
        y = top + i * (BAR + GAP) + GAP / 2
        middle = y + BAR / 2
        parts.append(
            element("text", bar.label, class_=f"name {bar.kind}", x=LABEL - 10, y=middle + 4, text_anchor="end")
        )
        parts.append(
            element("rect", class_=f"bar {bar.kind}", x=LABEL, y=y, width=max(1.0, x(bar.value) - LABEL), height=BAR)
        )
        if bar.first is not None:
            parts.append(
                element("rect", class_=f"first {bar.kind}", x=LABEL, y=y, width=x(bar.first) - LABEL, height=BAR)
            )
        if bar.low is not None and bar.high is not None:
            low, high = x(bar.low), x(bar.high)
            caps = "".join(f"M{at:.1f} {middle - 5}v10" for at in (low, high))
            parts.append(element("path", class_="whisker", d=f"M{low:.1f} {middle}H{high:.1f}{caps}"))
        end = x(max(bar.value, bar.high or 0.0))
        parts.append(element("text", bar.note, class_="note", x=end + 10, y=middle + 4))
    return svg(width, bottom + 22, title, parts)


def curves(
    title: str,
    across: str,
    series: dict[str, Sequence[float]],
    kinds: dict[str, str],
    width: int = 860,
    bands: dict[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> str:
    """Lines over steps 1, 2, ...; the first series is drawn widest, so that lines which coincide both stay visible.

    `bands` shades what lies between the lower and the upper line of a series.
    """
    height, left, right, top, bottom = 300, 48, 12, 12, 40
    bands = bands or {}
    edges = [edge for band in bands.values() for edge in band]
    values = [value for line in (*series.values(), *edges) for value in line]
    low, high = min(values), max(values)
    steps = max(len(line) for line in series.values())

    def scale(value: float, smallest: float, largest: float, start: float, end: float) -> float:
        return start + (value - smallest) / ((largest - smallest) or 1.0) * (end - start)

    def x(step: float) -> float:
        return scale(step, 1, steps, left, width - right)

    def y(value: float) -> float:
        return scale(value, low, high, height - bottom, top)

    parts = []
    for tick in ticks(low, high):
        parts.append(element("line", class_="grid", x1=left, x2=width - right, y1=y(tick), y2=y(tick)))
        parts.append(element("text", f"{tick:,g}", class_="tick", x=left - 8, y=y(tick) + 4, text_anchor="end"))
    for tick in ticks(1, steps, 6):
        parts.append(
            element("text", f"{tick:g}", class_="tick", x=x(tick), y=height - bottom + 18, text_anchor="middle")
        )
    parts.append(element("text", across, class_="tick", x=width - right, y=height - 4, text_anchor="end"))

    def points(line: Sequence[float]) -> list[str]:
        return [f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(line, 1)]

    orders = {name: order for order, name in enumerate(series)}
    for name, (lower, upper) in bands.items():
        outline = " ".join(points(upper) + points(lower)[::-1])
        parts.append(element("polygon", class_=f"band c{orders[name]}", points=outline))
    for name, line in series.items():
        parts.append(element("polyline", class_=f"curve c{orders[name]} {kinds[name]}", points=" ".join(points(line))))
    return svg(width, height, title, parts)


def legend(entries: dict[str, str]) -> str:
    """Name -> class of its swatch."""
    items = "".join(f'<li><i class="{kind}"></i>{escape(name)}</li>' for name, kind in entries.items())
    return f'<ul class="legend">{items}</ul>'


def table(head: Sequence[str], body: Sequence[Sequence[str]], mark: Callable[[int], str] = lambda _: "") -> str:
    """An HTML table; the first column is text, the rest figures; `mark(i)` gives row i its class."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        f'<tr class="{mark(i)}">' + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>"
        for i, line in enumerate(body)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def loglog(
    title: str, axes: tuple[str, str], series: dict[str, list[tuple[float, float]]], kinds: dict[str, str]
) -> str:
    """Lines through measured points on logarithmic axes, named at their right ends; `axes` names x and y."""
    width, height, left, right, top, bottom = 860, 380, 64, 250, 24, 44
    points = [point for line in series.values() for point in line]
    spans = [(math.log10(min(values)), math.log10(max(values))) for values in zip(*points, strict=True)]

    def place(value: float, span: tuple[float, float], start: float, end: float) -> float:
        return start + (math.log10(value) - span[0]) / ((span[1] - span[0]) or 1.0) * (end - start)

    def x(value: float) -> float:
        return place(value, spans[0], left, width - right)

    def y(value: float) -> float:
        return place(value, spans[1], height - bottom, top)

    parts = []
    for power in range(math.ceil(spans[1][0]), math.floor(spans[1][1]) + 1):
        at = y(10.0**power)
        parts.append(element("line", class_="grid", x1=left, x2=width - right, y1=at, y2=at))
        parts.append(element("text", f"{10.0**power:,g}", class_="tick", x=left - 8, y=at + 4, text_anchor="end"))
    for value in sorted({point[0] for point in points}):
        parts.append(
            element("text", f"{value:,.0f}", class_="tick", x=x(value), y=height - bottom + 20, text_anchor="middle")
        )
    parts.append(element("text", axes[0], class_="tick", x=width - right, y=height - 6, text_anchor="end"))
    parts.append(element("text", axes[1], class_="tick", x=left, y=12))
    lowest = -math.inf
    for name, line in sorted(series.items(), key=lambda item: y(item[1][-1][1])):
        kind, places = kinds[name], [(x(across), y(up)) for across, up in line]
        drawn = " ".join(f"{across:.1f},{up:.1f}" for across, up in places)
        parts.append(element("polyline", class_=f"trend {kind}", points=drawn))
        parts += [element("circle", class_=f"dot {kind}", cx=across, cy=up, r=3) for across, up in places]
        lowest = max(places[-1][1] + 4, lowest + 16)  # names of lines that end close together move apart
        parts.append(element("text", name, class_=f"name {kind}", x=places[-1][0] + 10, y=lowest))
    return svg(width, height, title, parts)


def arrows(title: str, moves: Sequence[Sequence[float]], target: Sequence[Sequence[float]], size: int = 420) -> str:
    """Points (x, y) that go to (x', y') as lines with a dot at their end, over the points of a target."""
    points = [*target, *((m[0], m[1]) for m in moves), *((m[2], m[3]) for m in moves)]
    reach = max(abs(value) for point in points for value in point) * 1.05

    def place(value: float) -> float:
        return (value / reach + 1) / 2 * size

    parts = [element("circle", class_="dot peer", cx=place(x), cy=place(-y), r=3) for x, y in target]
    for x, y, to_x, to_y in moves:
        ends = {"x1": place(x), "y1": place(-y), "x2": place(to_x), "y2": place(-to_y)}
        parts.append(element("line", class_="trend ours", **ends))
        parts.append(element("circle", class_="dot ours", cx=place(to_x), cy=place(-to_y), r=2))
    return svg(size, size, title, parts)
