"""The picture of a run: the right numbers, the worst group marked, labels that do not cover each other."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from grpo_kernels.trainer.report import draw, plot, read_curves
from grpo_kernels.trainer.report.labels import spread

pytest.importorskip("matplotlib")


def write_run(folder: Path, method: str = "gr_dpo", groups: int = 3, steps: int = 3) -> Path:
    """A run as its metrics tell it; group g2 ends worst, g0 least accurate."""
    folder.mkdir(parents=True)
    records = []
    for step in range(10, 10 * steps + 1, 10):
        alpha = {f"g{g}": (g + step / 10) / sum(k + step / 10 for k in range(groups)) for g in range(groups)}
        records.append({"kind": "train", "step": step, "alpha": alpha})
        measured = {
            f"g{g}": {"loss": 0.3 + 0.2 * g, "accuracy": 0.5 + 0.4 * g / groups, "margin": 1.0, "n": 5}
            for g in range(groups)
        }
        records.append(
            {"kind": "eval", "step": step, "mean_loss": 0.5, "mean_accuracy": 0.7, "groups": measured, "alpha": alpha}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(f"groups:\n  method: {method}\n")
    return folder


def texts(axis) -> dict[str, object]:
    return {text.get_text(): text for text in axis.texts}


def test_curves_are_those_of_the_metrics(tmp_path):
    curves = read_curves(write_run(tmp_path / "run"))
    assert curves.title == "GR-DPO"
    assert curves.loss["g1"] == ([10, 20, 30], [0.5, 0.5, 0.5])
    assert curves.mean_accuracy == ([10, 20, 30], [0.7] * 3)
    assert curves.alpha["g2"][0] == [10, 20, 30]
    assert (curves.worst_group, curves.least_accurate_group) == ("g2", "g0")


def test_runs_stand_side_by_side_on_the_same_scales_with_the_worst_marked(tmp_path):
    runs = [read_curves(write_run(tmp_path / m, m)) for m in ("dpo", "is_dpo", "gr_dpo")]
    figure = draw(runs, "heading")
    axes = figure.axes
    assert len(axes) == 9
    assert [axis.get_title(loc="left") for axis in axes[:3]] == ["DPO", "IS-DPO", "GR-DPO"]
    for row in range(3):
        assert len({axis.get_ylim() for axis in axes[3 * row : 3 * row + 3]}) == 1
    for axis in axes[:3]:
        assert "worst 0.70" in texts(axis)
    for axis in axes[3:6]:
        assert "worst 50%" in texts(axis)
    labels = texts(axes[2])
    assert {"g0", "g1", "g2", "all pairs"} <= set(labels)
    assert labels["g2"].get_fontweight() == "bold"
    assert labels["g0"].get_fontweight() == "normal"
    # The same group has the same colour everywhere, and its label too.
    colours = [{line.get_color() for line in axis.lines if line.get_linewidth() > 3} for axis in axes[:3]]
    assert colours[0] == colours[1] == colours[2] == {labels["g2"].get_color()}


def test_labels_lie_within_the_picture_and_not_on_each_other(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = draw([read_curves(write_run(tmp_path / "run", groups=6))])
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.get_size_inches() * figure.dpi
    for axis in figure.axes:
        boxes = sorted((t.get_window_extent(renderer) for t in axis.texts if type(t) is Text), key=lambda b: b.y0)
        for box in boxes:
            assert 0 <= box.x0 <= box.x1 <= width
            assert 0 <= box.y0 <= box.y1 <= height
        for below, above in pairwise(boxes):
            assert above.y0 >= below.y0 + 0.8 * below.height


def test_many_groups_keep_colour_for_the_worst_and_grey_for_the_rest(tmp_path):
    figure = draw([read_curves(write_run(tmp_path / "run", groups=12))])
    labels = texts(figure.axes[0])
    assert {"g11", "g6", "6 more"} <= set(labels)
    assert "g5" not in labels


def test_spreading_moves_as_little_as_it_must():
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread([0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1])
    assert spread([1.0, 1.0, 0.2][::-1], 0.1) == pytest.approx([0.2, 0.9, 1.0])
    assert spread([], 0.1) == []
    crowded = spread([0.5] * 4 + [0.52], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(crowded))


def test_the_same_run_gives_the_same_file(tmp_path):
    run = write_run(tmp_path / "run")
    first, second = (plot(run, tmp_path / "out" / f"{k}.png", titles=["a run"]) for k in range(2))
    assert first.read_bytes() == second.read_bytes()
    assert plot([run], tmp_path / "out.svg").read_text().startswith("<?xml")


def test_what_cannot_be_drawn_is_said(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="at least one run"):
        plot([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="titles must be one a run, got 2 for 1 runs"):
        plot([run], tmp_path / "x.png", titles=["a", "b"])
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "alpha": {}}\n')
    with pytest.raises(ValueError, match="holds no evaluation to draw"):
        plot([run], tmp_path / "x.png")
    (run / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not a record"):
        plot([run], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
