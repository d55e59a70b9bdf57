"""Figures of `prcl analyse`: t-SNE, and the path of the prototypes."""

from __future__ import annotations

import numpy as np

from prcl_fast.analysis.embedding_figures import Space, draw_prototypes, draw_tsne
from support.made_up_points import points


def space(**changes):
    x, group = points()
    prototypes = np.full((5, 4), np.nan)
    prototypes[[0, 1, 3]] = [x[group == c].mean(0) for c in (0, 1, 3)]
    virtual = np.repeat(prototypes[:, None], 2, axis=1) * 1.01
    palette = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250], [9, 9, 9]], np.uint8)
    values = {
        "classes": tuple("abcde"),
        "palette": palette,
        "representation": x,
        "group": group,
        "by": "true class",
        "prototypes": prototypes[:, None],
        "virtual": virtual,
        "variance": np.linspace(0.2, 0.6, 16),
        "wrong": np.arange(16) % 4 == 0,
    }
    return Space(**values | changes)


def drawn_points(collection):
    return np.asarray(collection.get_offsets())[~np.isnan(np.asarray(collection.get_offsets())).any(1)]


def test_tsne_shows_pixels_prototypes_and_virtual_negatives_in_the_colours_of_their_classes():
    figure = draw_tsne(space(), seed=0)
    pixels, stars, crosses = figure.axes[0].collections
    assert [len(drawn_points(part)) for part in (pixels, stars, crosses)] == [16, 3, 6]
    np.testing.assert_allclose(pixels.get_facecolors()[:, :3], space().palette[space().group] / 255)
    np.testing.assert_allclose(crosses.get_facecolors()[:, :3], np.repeat(space().palette, 2, axis=0) / 255)
    assert figure.axes[1].get_title("left").endswith("predicted wrongly (25 %)")
    ringed = drawn_points(figure.axes[1].collections[1])
    np.testing.assert_array_equal(ringed, drawn_points(pixels)[::4])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a", "b", "d", "prototype", "virtual negative"]
    again = draw_tsne(space(), seed=0).axes[0].collections[0]
    np.testing.assert_array_equal(drawn_points(again), drawn_points(pixels))
    plain = draw_tsne(space(virtual=None, variance=None, wrong=None), seed=0)
    assert len(plain.axes) == 1
    assert [text.get_text() for text in plain.legends[0].get_texts()][-1] == "prototype"


def test_every_prototype_of_a_class_is_a_star_in_its_colour():
    two = np.concatenate([space().prototypes, space().prototypes * [1, 1, 0, 1]], axis=1)
    figure = draw_tsne(space(prototypes=two, virtual=None), seed=0)
    pixels, stars, _ = figure.axes[0].collections  # no virtual negative is drawn
    assert [len(drawn_points(part)) for part in (pixels, stars)] == [16, 6]
    np.testing.assert_allclose(stars.get_facecolors()[:, :3], np.repeat(space().palette, 2, axis=0) / 255)
    figure = draw_prototypes(space(prototypes=two), [10, 20], np.stack([two[:, ::-1], two]), None)
    lines = figure.axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [2] * 6
    np.testing.assert_allclose(lines[0].get_xydata(), lines[1].get_xydata()[::-1])
    assert not np.array_equal(lines[0].get_color(), lines[2].get_color())


def test_paths_lead_to_the_star_of_the_last_checkpoint_in_one_projection():
    prototypes = space().prototypes
    first = np.where(np.arange(5)[:, None, None] == 1, np.nan, prototypes[..., ::-1])
    figure = draw_prototypes(space(), [10, 20], np.stack([first, prototypes]), None)
    lengths = [len(line.get_xdata()) for line in figure.axes[0].get_lines()]
    assert lengths == [2, 1, 2]  # class b had no prototype at iteration 10
    stars = figure.axes[0].collections[1:]
    for line, star in zip(figure.axes[0].get_lines(), stars, strict=True):
        np.testing.assert_allclose(line.get_xydata()[-1], drawn_points(star)[0])
    assert "iteration 10 to 20" in figure.axes[0].get_title("left")
    shift = (
        np.array([5, 10]),
        np.array([[0.1, np.nan, np.nan, 0.3, np.nan], [0.05, 0.2, np.nan, 0.1, np.nan]]),
    )
    figure = draw_prototypes(space(), [20], prototypes[None], shift)
    assert [line.get_ydata()[-1] for line in figure.axes[1].get_lines()][::3] == [0.05, 0.1]
