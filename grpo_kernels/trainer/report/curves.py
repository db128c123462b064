"""What the metrics of a run hold for a figure: loss, accuracy and alpha of every group over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run.directory import CONFIG, METRICS
from ..run.metrics import read_metrics

_METHODS = {"dpo": "DPO", "is_dpo": "IS-DPO", "gr_dpo": "GR-DPO"}


@dataclass(frozen=True)
class Curves:
    """What is drawn of one run.

    Args:
        title: above its column.
        loss, accuracy, alpha: group → (steps, values).
        mean_loss, mean_accuracy: over all test pairs, (steps, values).
        final_loss: group → last held-out loss.
    """

    title: str
    loss: dict[str, tuple[list[int], list[float]]]
    accuracy: dict[str, tuple[list[int], list[float]]]
    alpha: dict[str, tuple[list[int], list[float]]]
    mean_loss: tuple[list[int], list[float]]
    mean_accuracy: tuple[list[int], list[float]]
    final_loss: dict[str, float]

    @property
    def worst_group(self) -> str:
        """The group with the highest last held-out loss."""
        return max(self.final_loss, key=lambda name: self.final_loss[name])

    @property
    def least_accurate_group(self) -> str:
        """The group with the lowest last held-out accuracy, often but not always the worst."""
        return min(self.accuracy, key=lambda name: self.accuracy[name][1][-1])


def read_curves(run_dir: str | Path, title: str | None = None) -> Curves:
    """Read the curves of a run.

    Args:
        run_dir: folder of the run.
        title: None for the method's name.

    Raises:
        ValueError: no metrics there, or no evaluation in them.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir / METRICS)
    try:
        return _curves(records, run_dir, title)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{run_dir / METRICS} does not hold the records of a run: {error!r}") from error


def _curves(records: list[dict[str, Any]], run_dir: Path, title: str | None) -> Curves:
    evals = [record for record in records if record["kind"] == "eval"]
    if not evals:
        raise ValueError(f"{run_dir / METRICS} holds no evaluation to draw; train with data.test, and eval_every > 0")

    def of_groups(field: str) -> dict[str, tuple[list[int], list[float]]]:
        return {
            name: _points((e["step"], e["groups"][name][field]) for e in evals)
            for name in evals[-1]["groups"]
            if evals[-1]["groups"][name]["n"]
        }

    weighted = [record for record in records if record["kind"] in ("train", "eval")]
    alpha: dict[str, dict[int, float]] = {}
    for record in weighted:
        for name, value in record["alpha"].items():
            alpha.setdefault(name, {})[record["step"]] = value
    losses = of_groups("loss")
    if not all(values for _, values in (*losses.values(), *of_groups("accuracy").values())):
        raise ValueError(f"{run_dir / METRICS} has a group without a finite held-out loss: there is no line to draw")
    return Curves(
        title=title if title is not None else _method(run_dir),
        loss=losses,
        accuracy=of_groups("accuracy"),
        alpha={name: (sorted(values), [values[s] for s in sorted(values)]) for name, values in alpha.items()},
        mean_loss=_points((e["step"], e["mean_loss"]) for e in evals),
        mean_accuracy=_points((e["step"], e["mean_accuracy"]) for e in evals),
        final_loss={name: values[-1] for name, (_, values) in losses.items()},
    )


def _method(run_dir: Path) -> str:
    import yaml

    try:
        method = yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))["groups"]["method"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return run_dir.name
    return _METHODS.get(method, str(method))


def _points(pairs: Any) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in kept], [value for _, value in kept]
