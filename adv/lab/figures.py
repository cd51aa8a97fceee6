"""Figures as the book shows them: readable on a phone, in dark mode, and without color."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.rcsetup import cycler
from matplotlib.ticker import PercentFormatter
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "LINES", "MARKERS", "curve", "images", "perturbation", "png", "style"]

# Okabe and Ito's palette, distinct under common color blindness; its yellow vanishes on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 7.0  # inches; the width of the book's text column
CELL = 1.6  # inches; the most that one image of a grid takes
PNG_BYTES = 39_000


def style() -> None:
    """Set matplotlib's defaults to the book's: call once, after the imports.

    Lines differ in color and dashes at once; the background is white and opaque, so that axes stay
    readable on a dark page. In a notebook, figures are stored as ``png`` writes them.
    """
    mpl.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=LINES),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 12,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.figsize": (WIDTH, 3.2),
            "font.family": "DejaVu Sans",
            "font.size": 12,
            "grid.color": "#dddddd",
            "image.cmap": "gray",
            "image.interpolation": "nearest",
            "legend.fontsize": 11,
            "legend.framealpha": 0.9,
            "lines.linewidth": 2,
            "lines.markersize": 6,
            "savefig.dpi": 100,
            "savefig.facecolor": "white",
            "savefig.transparent": False,
            "svg.hashsalt": "adv",
        }
    )
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        # Loading its backend makes the notebook register a writer of its own; ours must come after.
        import matplotlib.pyplot as plt

        plt.switch_backend(mpl.get_backend())
        shell.display_formatter.formatters["image/png"].for_type(Figure, png)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file under 40 kB, with as many colors as fit.

    Args:
        figure: any matplotlib figure. Its size and resolution stay as they are.

    Returns:
        The file. Full color where that fits, else the largest palette that does, of 32 colors at
        least: a figure of many photographs can exceed the limit.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, bbox_inches="tight")
    picture = Image.open(buffer).convert("RGB")
    for colors in (256, 128, 64, 32):
        if buffer.tell() <= PNG_BYTES:
            break
        buffer = io.BytesIO()
        palette = picture.quantize(colors, dither=Image.Dither.NONE)
        palette.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def images(
    rows: Sequence[Any],
    *,
    titles: Sequence[str] | Sequence[Sequence[str]] | None = None,
    row_labels: Sequence[str] | None = None,
    deltas: Sequence[int] = (),
    bounds: tuple[float, float] = (0.0, 1.0),
    width: float = WIDTH,
) -> np.ndarray:
    """Draw a grid of images: one row for each batch, one column for each sample.

    Args:
        rows: batches of images, tensors or arrays: (N, H, W), (N, 1, H, W) or (N, 3, H, W). They
            may differ in length; empty places stay blank.
        titles: one text above each column, or for each row a list of texts above its images.
        row_labels: one text left of each row.
        deltas: numbers of the rows that hold perturbations, drawn by ``perturbation`` with one
            scale for the row, written at the row's label.
        bounds: the values drawn black and white.
        width: of the figure in inches at most; its height follows.

    Returns:
        (rows, columns) array of matplotlib axes.

    Raises:
        ValueError: no rows, a batch of another shape, or titles, labels or ``deltas`` that do not
            fit the rows.
    """
    import matplotlib.pyplot as plt

    batches = [_batch(row) for row in rows]
    if not batches:
        raise ValueError("images() needs at least one row of images")
    columns = max(map(len, batches))
    texts = _texts(titles, batches)
    labels = [""] * len(batches) if row_labels is None else list(row_labels)
    if len(labels) != len(batches) or not set(deltas) <= set(range(len(batches))):
        raise ValueError(f"images(): row_labels and deltas must fit {len(batches)} rows")
    margin = 1.0 if any(labels) else 0.0
    cell = min((width - margin) / columns, CELL)
    aspect = max(batch.shape[1] / batch.shape[2] for batch in batches)
    height = len(batches) * cell * aspect + 0.3 * sum(map(any, texts))
    layout: Any = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    _, axes = plt.subplots(
        len(batches),
        columns,
        figsize=(margin + cell * columns, height),
        squeeze=False,
        layout=layout,
    )
    for r, batch in enumerate(batches):
        limit = float(np.abs(batch).max()) or 1.0 if r in deltas else None
        if limit is not None:
            labels[r] = f"{labels[r]}\n±{limit:.2g}".lstrip("\n")
        _draw_row(axes[r], batch, texts[r], limit, bounds)
        axes[r, 0].set_ylabel(
            labels[r], rotation=0, ha="right", va="center", fontsize=11, multialignment="right"
        )
    return axes


def _draw_row(
    axes: Any, batch: np.ndarray, texts: list[str], limit: float | None, bounds: tuple[float, float]
) -> None:
    for ax in axes:
        _blank(ax)
    for ax, image, text in zip(axes, batch, texts, strict=False):
        if limit is not None:
            perturbation(image, limit=limit, ax=ax, show_scale=False)
        else:
            low, high = bounds
            if image.ndim == 3:  # of colors, imshow takes no bounds
                image = np.clip((image - low) / (high - low), 0, 1)
            ax.imshow(image, cmap="gray", vmin=low, vmax=high)
        ax.set_title(text, fontsize=11)


def _texts(titles: Any, batches: Sequence[np.ndarray]) -> list[list[str]]:
    """A text for each image: those of the columns go to the first row."""
    columns = max(map(len, batches))
    blank = [[""] * len(batch) for batch in batches]
    if titles is None or not len(titles):
        return blank
    texts = [list(titles), *blank[1:]] if isinstance(titles[0], str) else [*map(list, titles)]
    if len(texts) != len(batches) or any(
        not len(batch) <= len(row) <= columns for row, batch in zip(texts, batches, strict=True)
    ):
        raise ValueError("images(): titles must be one for each column, or one for each image")
    return texts


def perturbation(
    delta: Any, *, limit: float | None = None, ax: Axes | None = None, show_scale: bool = True
) -> Axes:
    r"""Draw one perturbation with its scale: no change is white (in color images: mid-gray).

    Args:
        delta: (H, W), (1, H, W), (3, H, W) or (H, W, 3) perturbation $\delta$.
        limit: the change drawn in the strongest color; by default the largest there is.
        ax: axes to draw in; by default new ones.
        show_scale: write the scale below the image.

    Returns:
        The axes.

    Raises:
        ValueError: not one image, or a limit that is not positive.
    """
    import matplotlib.pyplot as plt

    image = _array(delta)
    image = image if image.ndim == 3 and image.shape[-1] == 3 else _batch(image[None])[0]
    if limit is not None and not limit > 0:
        raise ValueError(f"perturbation() needs a positive limit, not {limit}")
    scale = limit or float(np.abs(image).max()) or 1.0
    if ax is None:
        _, ax = plt.subplots(figsize=(3, 3))
    _blank(ax)
    if image.ndim == 3:
        ax.imshow(np.clip(0.5 + image / (2 * scale), 0, 1))
    else:
        ax.imshow(image, cmap="RdBu_r", vmin=-scale, vmax=scale)
    if show_scale:
        ax.set_xlabel(rf"$\delta$ in ±{scale:.2g}", fontsize=11)
    return ax


def curve(
    x: Any,
    curves: Mapping[str, Any],
    *,
    xlabel: str = r"$\varepsilon$",
    ylabel: str = "accuracy",
    spread: Mapping[str, Any] | None = None,
    percent: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw labelled curves over a common axis; color, dashes and marker tell them apart.

    Args:
        x: (N,) places, such as radii eps.
        curves: label and (N,) values; with ``percent``, fractions of 1.
        xlabel: what x is, with its unit.
        ylabel: what the values are, with their unit unless ``percent``.
        spread: label and (N,) half-width of a band around the curve.
        percent: show fractions as percent, on an axis from 0 to 100 %.
        ax: axes to draw in; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: a curve of another length than ``x``, or a spread without a curve.
    """
    import matplotlib.pyplot as plt

    places = _array(x)
    if ax is None:
        _, ax = plt.subplots()
    if stray := set(spread or ()) - set(curves):
        raise ValueError(f"spread for {', '.join(map(str, stray))}, of which there is no curve")
    for i, (label, values) in enumerate(curves.items()):
        y = _array(values)
        if y.shape != places.shape:
            raise ValueError(f"curve {label!r} has shape {y.shape}, x has {places.shape}")
        color = COLORS[i % len(COLORS)]
        dashes, marker = LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        ax.plot(places, y, color=color, linestyle=dashes, marker=marker, label=label)
        if spread is not None and label in spread:
            half = _array(spread[label])
            ax.fill_between(places, y - half, y + half, color=color, alpha=0.2, linewidth=0)
    if percent:
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if len(curves) > 1:
        ax.legend()
    return ax


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float)


def _batch(images: Any) -> np.ndarray:
    """(N, H, W) gray or (N, H, W, 3) color, as matplotlib wants them."""
    batch: Any = np.stack([_array(image) for image in images]) if len(images) else np.empty(0)
    if batch.ndim == 4 and batch.shape[1] == 1:
        return batch[:, 0]
    if batch.ndim == 4 and batch.shape[1] == 3:
        return batch.transpose(0, 2, 3, 1)
    if batch.ndim == 3 and len(batch):
        return batch
    raise ValueError(
        f"need images of shape (N, H, W), (N, 1, H, W), (N, 3, H, W), not {batch.shape}"
    )


def _blank(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
