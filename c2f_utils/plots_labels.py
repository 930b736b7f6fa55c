"""Names written beside lines and points instead of in a legend, without overlaps.

Geometry is in points (1/72 inch), so that a figure reads the same at any resolution.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes


def end_labels(ax: Axes, ends: Sequence[tuple[float, float, str, str]], size: float = 7) -> None:
    """Name lines at the right edge, (x, y, text, colour) of each, moved apart vertically where they would overlap."""
    ends = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1])
    if not ends:
        return
    ax.figure.draw_without_rendering()
    points = [ax.transData.transform((x, y))[1] * 72 / ax.figure.dpi for x, y, *_ in ends]
    for (_, y, text, colour), at, place in zip(ends, points, spread(points, size * 1.25), strict=True):
        ax.annotate(
            text, (1, y), xycoords=("axes fraction", "data"), xytext=(3, place - at), textcoords="offset points",
            va="center", color=colour, fontsize=size, annotation_clip=False,
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Sorted positions moved as little as needed so that neighbours are at least `gap` apart."""
    blocks: list[list[float]] = []  # [mean of (place - k * gap), count]: pool adjacent violators
    for index, place in enumerate(places):
        blocks.append([place - index * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, count = blocks.pop()
            blocks[-1] = [
                (blocks[-1][0] * blocks[-1][1] + mean * count) / (blocks[-1][1] + count),
                blocks[-1][1] + count,
            ]
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [value + index * gap for index, value in enumerate(flat)]


def point_labels(
    ax: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], colours: Sequence[str],
    obstacles: Sequence[tuple[float, float]] = (), size: float = 6.5, bold: Sequence[bool] = (),
) -> list:  # fmt: skip
    """Name points directly, beside them where there is room, else further off with a thin line; no two overlap.

    The layout is settled first and kept. Each label takes the cheapest of 24 directions x 8 distances; four rounds let
    early ones make way for late ones. Returns the annotations.
    """
    fig = ax.figure
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
    scale = 72 / fig.dpi  # all geometry in points
    where = ax.transData.transform(np.array([*points, *obstacles], dtype=float).reshape(-1, 2)) * scale
    frame = np.array(ax.get_window_extent().extents) * scale
    sizes = [_text_size(ax, text, size, bool(bold) and bold[k]) for k, text in enumerate(texts)]
    angles, reaches = np.arange(24) * math.pi / 12, (1, 5, 11, 18, 27, 38, 52, 70)
    chosen: list = [None] * len(points)
    for _ in range(4):
        for k, (width, height) in enumerate(sizes):
            taken = [place[0] for j, place in enumerate(chosen) if place and j != k]
            options = []
            for reach in reaches:
                for angle in angles:
                    offset = _offset(angle, reach + 3, width, height)
                    box = _box(where[k] + offset, width, height)
                    cost = _cost(box, taken, where, frame) + reach + 2 * abs(math.sin(angle))
                    options.append((cost, tuple(offset), box))
            _, offset, box = min(options, key=lambda option: option[0])
            chosen[k] = (box, offset)
    drawn = []
    for k, ((x, y), text, colour) in enumerate(zip(points, texts, colours, strict=True)):
        _, (dx, dy) = chosen[k]
        far = math.hypot(max(0, abs(dx) - sizes[k][0] / 2), max(0, abs(dy) - sizes[k][1] / 2)) > 9
        arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": colour, "shrinkA": 0, "shrinkB": 2} if far else None
        drawn.append(
            ax.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", ha="center", va="center", color=colour,
                fontsize=size, arrowprops=arrow, zorder=6, fontweight="bold" if bold and bold[k] else "normal",
            )
        )  # fmt: skip
    return drawn


def _text_size(ax: Axes, text: str, size: float, bold: bool) -> tuple[float, float]:
    artist = ax.text(0, 0, text, fontsize=size, fontweight="bold" if bold else "normal")
    extent = artist.get_window_extent()
    artist.remove()
    return extent.width * 72 / ax.figure.dpi + 2, extent.height * 72 / ax.figure.dpi + 1


def _offset(angle: float, reach: float, width: float, height: float) -> np.ndarray:
    """Centre of a label whose nearest edge is `reach` away in the direction of `angle`."""
    direction = np.array([math.cos(angle), math.sin(angle)])
    return direction * reach + direction * np.array([width, height]) / 2


def _box(centre: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.array([centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2])


def _cost(box: np.ndarray, taken: Sequence[np.ndarray], points: np.ndarray, frame: np.ndarray) -> float:
    outside = max(0, frame[0] - box[0]) + max(0, frame[1] - box[1])
    outside += max(0, box[2] - frame[2]) + max(0, box[3] - frame[3])
    cost = 30 * outside
    for other in taken:
        wide, high = min(box[2], other[2]) - max(box[0], other[0]), min(box[3], other[3]) - max(box[1], other[1])
        cost += 500 + wide * high if wide > 0 and high > 0 else 0
    inside = (points > box[:2] - 2.5) & (points < box[2:] + 2.5)
    return cost + 150 * int(inside.all(axis=1).sum())
