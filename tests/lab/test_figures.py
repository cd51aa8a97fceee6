"""Figures are checked by what they drew, by their files, and without a display."""

import io
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image

from adv.lab import figures

mpl.use("agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def _clean():
    with mpl.rc_context():
        figures.style()
        yield
    plt.close("all")


def drawn(ax):
    return np.asarray(ax.images[0].get_array())


def test_images_draws_each_image_in_its_place():
    rng = np.random.default_rng(0)
    gray, color = rng.random((3, 1, 8, 8)), torch.tensor(rng.random((2, 3, 8, 8)))
    axes = figures.images(
        [gray, color], titles=["a", "b", "c"], row_labels=["gray", "color"], bounds=(0, 2)
    )
    assert axes.shape == (2, 3)
    assert np.allclose(drawn(axes[0, 1]), gray[1, 0])
    assert axes[0, 1].images[0].get_clim() == (0, 2)
    assert np.allclose(drawn(axes[1, 0]), color[0].permute(1, 2, 0) / 2)
    assert not axes[1, 2].images  # the shorter row's empty place
    assert [ax.get_title() for ax in axes[0]] == ["a", "b", "c"]
    assert [ax.get_title() for ax in axes[1]] == ["", "", ""]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["gray", "color"]


def test_a_row_of_deltas_shares_one_symmetric_written_scale():
    delta = torch.zeros(2, 1, 4, 4)
    delta[0, 0, 0, 0], delta[1, 0, 1, 1] = 0.1, -0.25
    axes = figures.images(
        [delta, delta], row_labels=["clean", "delta"], deltas=[1], titles=[["", ""], ["x", "y"]]
    )
    assert [ax.images[0].get_clim() for ax in axes[1]] == [(-0.25, 0.25)] * 2
    assert axes[1, 0].get_ylabel() == "delta\n±0.25"
    assert axes[1, 1].get_title() == "y"
    assert axes[0, 0].images[0].get_clim() == (0, 1)
    nothing = figures.images([0 * delta], deltas=[0])  # an attack that changed nothing
    assert (drawn(nothing[0, 1]) == 0).all()


def test_no_change_is_white_and_the_scale_is_written():
    ax = figures.perturbation(torch.tensor([[0.0, 0.3], [-0.3, 0.1]]))
    picture = ax.images[0]
    assert picture.get_clim() == pytest.approx((-0.3, 0.3))
    assert min(picture.cmap(picture.norm(0.0))[:3]) > 0.95
    assert "0.3" in ax.get_xlabel()
    rgb = torch.zeros(3, 2, 2)
    rgb[0, 0, 0], rgb[1, 1, 1] = 0.2, -0.1
    shown = drawn(figures.perturbation(rgb, limit=0.4))
    assert np.allclose(shown[0, 0], [0.75, 0.5, 0.5])
    assert np.allclose(shown[1, 1], [0.5, 0.375, 0.5])
    figures.perturbation(torch.zeros(2, 2))  # nothing to scale by


def test_curves_differ_without_color():
    x = np.linspace(0, 0.3, 4)
    values = {f"model {i}": np.linspace(1, i / 10, 4) for i in range(7)}
    mpl.rcdefaults()  # nor does this depend on style()
    ax = figures.curve(x, values, spread={"model 2": np.full(4, 0.1)})
    looks = {(repr(line._unscaled_dash_pattern), line.get_marker()) for line in ax.lines}
    assert len(looks) == 7
    assert len({line.get_marker() for line in ax.lines}) == 7
    assert len({repr(line._unscaled_dash_pattern) for line in ax.lines}) == 7
    assert np.allclose(ax.lines[3].get_ydata(), values["model 3"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(values)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    middle = values["model 2"]
    assert (band.min(), band.max()) == pytest.approx((middle.min() - 0.1, middle.max() + 0.1))
    assert ax.yaxis.get_major_formatter()(0.5) == "50%"
    assert ax.get_xlabel()


def luminance(color):
    linear = [v / 12.92 if v < 0.04 else ((v + 0.055) / 1.055) ** 2.4 for v in colors.to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_colors_are_seen_on_the_white_background():
    for color in figures.COLORS:
        assert (1.05) / (luminance(color) + 0.05) > 2  # contrast, as WCAG defines it
    assert len(set(figures.COLORS)) == len(figures.LINES) == len(figures.MARKERS)
    assert colors.to_rgba(mpl.rcParams["figure.facecolor"]) == (1, 1, 1, 1)


def test_png_is_small_opaque_and_repeatable():
    def busy():
        x = np.linspace(0, 0.3, 7)
        ax = figures.curve(x, {str(i): np.exp(-x * i * 3) for i in range(7)})
        return figures.png(ax.figure)

    file = busy()
    assert file == busy()
    assert len(file) < 40_000 < len(_plain(plt.gcf()))  # the limit had to be enforced
    picture = Image.open(io.BytesIO(file))
    assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    assert 600 < picture.width < 760
    noisy, _ = plt.subplots(1, 1, figsize=(1, 1))
    assert figures.png(noisy) == figures.png(noisy)
    assert Image.open(io.BytesIO(figures.png(noisy))).mode == "RGBA"  # small: full color


def _plain(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, bbox_inches="tight")
    return buffer.getvalue()


def test_style_registers_the_writer_in_a_notebook(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    figures.style()
    writer = shell.display_formatter.formatters["image/png"]
    assert writer.lookup_by_type(Figure) is figures.png


@pytest.mark.parametrize(
    "call",
    [
        lambda: figures.images([]),
        lambda: figures.images([np.zeros((2, 2, 8, 8))]),
        lambda: figures.images([np.zeros((0, 8, 8))]),
        lambda: figures.perturbation(np.zeros((2, 3, 8, 8))),
        lambda: figures.perturbation(np.zeros((8, 8)), limit=0),
        lambda: figures.images([np.zeros((2, 8, 8))], titles=["a"]),
        lambda: figures.images([np.zeros((2, 8, 8))] * 2, titles=[["a", "b"]]),
        lambda: figures.images([np.zeros((2, 8, 8))] * 2, row_labels=["a"]),
        lambda: figures.images([np.zeros((2, 8, 8))], deltas=[1]),
        lambda: figures.curve([0, 1], {"a": [1, 2, 3]}),
        lambda: figures.curve([0, 1], {"a": [1, 2]}, spread={"b": [1, 1]}),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match=r"images|limit|shape|spread"):
        call()


def test_import_needs_neither_pyplot_nor_a_display():
    code = "import sys, adv.lab.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
