"""Figures of a run: curves and panels by method, and messages for corrupt records."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from prcl_fast.analysis.curves import draw_curves, draw_representation, running_mean
from prcl_fast.analysis.figures import write_figures
from prcl_fast.analysis.panel import PanelRow, draw_panel
from prcl_fast.cli.figures import figures_command
from prcl_fast.errors import InputError
from prcl_fast.runs.metrics import read_metrics, series
from support.run_folders import write_metrics, write_run
from support.tiny import tiny_tree

PALETTE = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)


def titles(figure):
    return [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center") if axes.get_title(loc)]


def curve(axes, label):
    (line,) = (line for line in axes.get_lines() if str(line.get_label()).startswith(label))
    return line.get_xdata(), line.get_ydata()


def metrics_of(tmp_path, method, steps=40):
    write_metrics(tmp_path, method, steps)
    return read_metrics(tmp_path / "metrics.jsonl")


def test_records_are_read_by_kind_and_null_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"kind": "train", "iteration": 1, "loss": 2.5}\n\n'
        '{"kind": "eval", "iteration": 1, "miou": null}\n'
        '{"kind": "train", "iteration": 2, "loss": null, "note": "any"}\n'
        '{"kind": "train", "iteration": 3, "loss": 1}'
    )
    metrics = read_metrics(path)
    assert (len(metrics.train), len(metrics.evaluations)) == (3, 1)
    iterations, values = series(metrics.train, "loss")
    assert (iterations.tolist(), values.tolist()) == ([1, 3], [2.5, 1])
    assert [len(part) for part in series(metrics.evaluations, "miou")] == [0, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "train", "iter', "not a line of JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"kind": "test", "iteration": 1}', "kind: expected train, eval or extend, got 'test'"),
        ('{"kind": "train", "iteration": "7"}', "iteration: expected an integer, got '7'"),
        ('{"kind": "train", "iteration": 7, "loss": "low"}', "loss: expected a number, got 'low'"),
        (
            '{"kind": "eval", "iteration": 7, "variance_auroc": "x"}',
            "variance_auroc: expected a number, got 'x'",
        ),
        ('{"kind": "train", "iteration": 7, "loss": NaN}', "loss: expected a number, got nan"),
    ],
)
def test_a_corrupt_line_is_named_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "iteration": 1, "loss": 2.5}\n' + line + "\n")
    with pytest.raises(InputError) as caught:
        read_metrics(path)
    assert str(caught.value) == f"{path}:2: {message}"


def test_missing_empty_and_binary_metrics_are_input_errors(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match="no such file"):
        read_metrics(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="no record yet"):
        read_metrics(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_metrics(path)


def test_curves_show_losses_contrast_beside_chance_and_both_networks(tmp_path):
    figure = draw_curves(metrics_of(tmp_path, "prcl"))
    assert titles(figure) == ["Loss", "Contrastive loss", "Validation mIoU"]
    losses, contrast, miou = figure.axes
    assert curve(losses, "labeled")[1][-1] == pytest.approx(0.5)
    assert curve(losses, "unlabeled")[1][-1] == pytest.approx(0.1)
    assert curve(contrast, "contrast")[1][-1] == pytest.approx(4.2)
    assert set(curve(contrast, "chance")[1]) == {6.24}
    assert curve(miou, "teacher, best 50.0")[0].tolist() == [10, 20, 30, 40]
    assert curve(miou, "student, best 45.0")[1].tolist() == [11.25, 22.5, 33.75, 45]
    assert {axes.get_xlabel() for axes in figure.axes} == {"iteration"}
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss, nats", "loss, nats", "mIoU, %"]


def test_curves_leave_out_what_a_method_does_not_have(tmp_path):
    assert titles(draw_curves(metrics_of(tmp_path, "mean_teacher"))) == ["Loss", "Validation mIoU"]
    metrics = metrics_of(tmp_path, "supervised")
    losses, miou = draw_curves(metrics).axes
    assert [line.get_label() for line in losses.get_lines()] == ["labeled $L_s$"]
    assert len(miou.get_legend().get_texts()) == 1  # student only
    assert draw_representation(metrics) is None


def test_legends_stand_above_the_data(tmp_path):
    for figure in (
        draw_curves(metrics_of(tmp_path, "prcl")),
        draw_representation(metrics_of(tmp_path, "prcl")),
    ):
        for axes in figure.axes:
            assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1 - 1


def test_representation_shows_mean_and_standard_deviation_of_variance_and_mu(tmp_path):
    variance, mu, auroc = draw_representation(metrics_of(tmp_path, "prcl")).axes
    assert curve(variance, "mean")[1][-1] == pytest.approx(0.3)
    band = variance.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.25)
    assert mu.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(2.0)
    assert curve(auroc, r"$\sigma^2$, teacher")[1].tolist() == pytest.approx([0.55, 0.6, 0.65, 0.7])
    assert curve(auroc, r"$\sigma^2$, student")[1][-1] == pytest.approx(0.6)
    assert set(curve(auroc, "1 - confidence")[1]) == {0.8}


def test_running_mean_is_centred_and_shorter_at_the_ends():
    assert running_mean(np.array([0.0, 3, 6, 3, 0]), 3).tolist() == [1.5, 3, 4, 3, 1.5]


def panel_row(pseudo=True, variance=True):
    truth = np.array([[0, 1], [2, 255]], np.uint8)
    label = np.array([[0, 1], [2, 2]], np.uint8)
    confidence = np.array([[0.99, 0.5], [0.97, 0.98]], np.float32)
    spread = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
    image = np.zeros((2, 2, 3), np.uint8)
    return PanelRow(
        "a",
        image,
        truth,
        label,
        label if pseudo else None,
        confidence if pseudo else None,
        spread if variance else None,
    )


def test_panel_pales_pseudo_labels_that_are_not_confident_and_says_the_share():
    figure = draw_panel([panel_row()], ("sky", "road", "car"), PALETTE, 0.97)
    assert titles(figure) == [
        "Image",
        "Truth",
        "Pseudo-label (teacher)",
        "Prediction (student)",
        r"Variance $\sigma^2$ (student)",
    ]
    shown = np.asarray(figure.axes[2].get_images()[0].get_array())
    assert shown[0, 0].tolist() == [250, 0, 0]
    assert shown[1, 1].tolist() == [0, 0, 250]
    assert (shown[0, 1] >= 204).all()
    assert (shown[1, 0] >= 204).all()  # exactly delta_u is not above it
    assert figure.axes[2].get_xlabel() == "50% above 0.97 (rest pale)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "sky",
        "road",
        "car",
        "not labeled",
    ]


def test_panel_leaves_out_columns_that_a_method_does_not_have():
    classes = ("sky", "road", "car")
    figure = draw_panel([panel_row(variance=False)], classes, PALETTE, 0.97)
    assert titles(figure) == ["Image", "Truth", "Pseudo-label (teacher)", "Prediction (student)"]
    figure = draw_panel([panel_row(False, False)], classes, PALETTE, None)
    assert titles(figure) == ["Image", "Truth", "Prediction (student)"]


@pytest.mark.parametrize(
    ("method", "names"),
    [("prcl", ["curves", "representation", "panel"]), ("supervised", ["curves", "panel"])],
)
def test_a_run_folder_gets_its_figures(tmp_path, capsys, method, names):
    write_run(tmp_path, tiny_tree(tmp_path, name=method))
    write_metrics(tmp_path, method)
    figures_command(tmp_path, device="cpu")
    paths = [tmp_path / "figures" / f"{name}.png" for name in names]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in paths]
    assert sorted((tmp_path / "figures").iterdir()) == sorted(paths)
    for path in paths:
        with Image.open(path) as png:
            assert png.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert len(png.convert("RGB").getcolors(1 << 24)) > 50


def test_a_missing_run_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such run folder"):
        write_figures(tmp_path / "nowhere")
