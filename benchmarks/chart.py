"""Line charts as SVG, written by hand so that equal numbers give equal files."""

from __future__ import annotations

import math
from html import escape

COLORS = ("#d1495b", "#30638e", "#3a9b6b", "#e08e1b", "#7d5ba6", "#5c6770", "#17807e", "#a0522d")
WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 240, 46, 46, 26
# A line is a name with its points (x, y); a panel a title with its lines.
Line = tuple[str, list[tuple[float, float]]]
Panel = tuple[str, list[Line]]


def chart(title: str, unit: str, panels: list[Panel], ceiling: tuple[str, float] | None = None) -> str:
    """Panels side by side with one scale: x in powers of two, y from 0. `ceiling` is a named, dashed level."""
    points = [point for _, lines in panels for _, line in lines for point in line]
    xs = sorted({x for x, _ in points})
    highest = max([y for _, y in points] + ([ceiling[1]] if ceiling is not None else []))
    step = _step(highest)
    top = step * math.ceil(highest / step)
    names = list(dict.fromkeys(name for _, lines in panels for name, _ in lines))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    width = LEFT + len(panels) * (WIDTH + GAP)
    height = TOP + HEIGHT + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}, {escape(unit)}</text>',
    ]
    for number, (name, lines) in enumerate(panels):
        left = LEFT + number * (WIDTH + GAP)
        parts += _axes(left, name, xs, top, step)
        if ceiling is not None:
            y, dark = _y(top, ceiling[1]), "#333333"
            ends = f'x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}"'
            parts.append(f'<line {ends} stroke="{dark}" stroke-dasharray="5 4"/>')
            parts.append(f'<text x="{left + 4}" y="{y - 4:.1f}" fill="{dark}">{escape(ceiling[0])}</text>')
        for label, line in lines:
            path = " ".join(f"{_x(left, xs, x):.1f},{_y(top, y):.1f}" for x, y in sorted(line))
            color = colors[label]
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
    for i, name in enumerate(names):
        x, y = LEFT + i * (width - LEFT) / len(names), height - 8
        parts.append(f'<rect x="{x:.1f}" y="{y - 9}" width="9" height="9" fill="{colors[name]}"/>')
        parts.append(f'<text x="{x + 13:.1f}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axes(left: float, name: str, xs: list[float], top: float, step: float) -> list[str]:
    parts = [f'<text x="{left + WIDTH / 2}" y="36" text-anchor="middle">{escape(name)}</text>']
    for i in range(round(top / step) + 1):
        y = _y(top, i * step)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}" stroke="#dddddd"/>')
        if left == LEFT:
            parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    # Too many to name: powers of two times the first.
    named = xs if len(xs) <= 8 else [x for x in xs if math.log2(x / xs[0]) % 1 == 0]
    for x in named:
        label = f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"
        at = _x(left, xs, x)
        parts.append(f'<text x="{at:.1f}" y="{TOP + HEIGHT + 15}" text-anchor="middle">{label}</text>')
    return parts


def _x(left: float, xs: list[float], x: float) -> float:
    span = math.log2(xs[-1] / xs[0]) or 1.0
    return left + 12 + (WIDTH - 24) * math.log2(x / xs[0]) / span


def _y(top: float, y: float) -> float:
    return TOP + HEIGHT * (1 - y / top)


def _step(largest: float) -> float:
    """A round distance of gridlines that gives four to nine of them."""
    power = 10.0 ** math.floor(math.log10(largest / 4))
    return next(power * m for m in (1, 2, 5, 10) if largest / (power * m) <= 9)
