"""What a run tells people: one line per evaluation, the last table, a tracker."""

import importlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.datasets import Dataset
from common.errors import UserError
from common.options import to_json
from common.tasks import normalized_score


def describe(dataset: Dataset) -> str:
    """One line: name, size, dimensions, what the behaviour reached."""
    figures = data_figures(dataset)
    return (
        f"{dataset.name}, {dataset.num_transitions} transitions in "
        f"{len(dataset.episode_lengths)} episodes, observations {dataset.obs_dim}, "
        f"actions {dataset.action_dim}, mean return {figures['return']:.4g}, mean "
        f"length {figures['length']:.4g}, domain {dataset.domain}"
        + (" (defaults untested there)" if dataset.domain == "other" else "")
    )


def data_figures(dataset: Dataset) -> dict[str, float]:
    returns = np.asarray(dataset.episode_returns, np.float64)
    figures = {"return": float(returns.mean())}
    figures["length"] = float(np.mean(dataset.episode_lengths))
    if dataset.task is not None:
        success = float((returns > 0).mean())
        figures["score"] = normalized_score(dataset.task, figures["return"], success)
        if dataset.task.ends_at_success:
            figures["success"] = success
    return figures


def flat(config: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in to_json(config).items():
        nested = isinstance(value, dict)
        flat |= (
            {f"{name}.{k}": v for k, v in value.items()} if nested else {name: value}
        )
    return flat


def number(text: Any) -> Any:
    """A log's cell as int, float or None."""
    if isinstance(text, str):
        if not text:
            return None
        return int(text) if text.lstrip("-").isdigit() else float(text)
    return text


def line(step: int, rows: list[dict[str, Any]]) -> str:
    """One evaluation for people: mean over the seeds of the main quantities."""
    parts = [f"update {step:>8}"]
    for name in ("score", "return", "length", "certainty", "omega", "q", "critic_loss"):
        values = [r[name] for r in rows if r.get(name, "") != ""]
        if values:
            parts.append(f"{name} {np.mean(values):.4g}")
    return "  ".join(parts)


def table(rows: Mapping[str, dict[str, Any]], dataset: Dataset) -> str:
    """The last evaluation, a line per lane, mean and sd, and the data beside them.

    Args:
        rows: by the lane's label; lanes that differ in their seed alone are averaged.
    """
    names = ("score", "return", "success", "length")
    width = max([8, *(len(label) for label in rows)])

    def line(label: str, values: Mapping[str, Any]) -> str:
        cells = [number(values.get(n)) for n in names]
        shown = ["-" if c is None or np.isnan(c) else f"{c:.4g}" for c in cells]
        return f"{label:>{width}}" + "".join(f"{c:>12}" for c in shown)

    lines = [" " * width + "".join(f"{n:>12}" for n in names)]
    for _, group in itertools.groupby(rows, lambda label: label.rpartition("seed")[0]):
        lanes = {label: rows[label] for label in group}
        lines += [line(label, row) for label, row in lanes.items()]
        cells = np.array([[number(r[n]) for n in names] for r in lanes.values()], float)
        if len(lanes) > 1:
            mean, sd = cells.mean(axis=0).tolist(), cells.std(axis=0, ddof=1).tolist()
            lines.append(line("mean", dict(zip(names, mean, strict=True))))
            lines.append(line("sd", dict(zip(names, sd, strict=True))))
    lines.append(line("data", data_figures(dataset)))
    return "\n".join(lines)


class Tracker:
    """Sends rows to TensorBoard or Weights & Biases, or nowhere."""

    def __init__(self, kind: str) -> None:
        """Looks for the tracker's package; UserError if it is not installed."""
        package = {"tensorboard": "tensorboardX", "wandb": "wandb"}.get(kind)
        self.kind = kind
        self.sink: Any = None
        if package:
            try:
                self.module = importlib.import_module(package)
            except ImportError as error:
                raise UserError(
                    f"--track {kind} needs {package}: uv sync --extra {kind}"
                ) from error

    def open(self, folder: Path, algorithm: str, options: dict[str, Any]) -> None:
        """Starts tracking the run in `folder`."""
        try:
            if self.kind == "tensorboard":
                self.sink = self.module.SummaryWriter(str(folder / "tensorboard"))
            elif self.kind == "wandb":
                self.sink = self.module.init(
                    project=algorithm, name=folder.name, config=options
                )
        except Exception as error:  # a stranger's code: not logged in, no network, ...
            raise UserError(f"--track {self.kind} did not start: {error}") from error

    def send(self, rows: Mapping[str, dict[str, Any]]) -> None:
        """Sends the rows of one evaluation, as `<label>/<name>`."""
        for label, row in rows.items() if self.sink else ():
            values = {
                f"{label}/{name}": value
                for name, value in row.items()
                if name not in ("seed", "step") and value != ""
            }
            if self.kind == "wandb":
                self.sink.log({**values, "step": row["step"]})
                continue
            for name, value in values.items():
                self.sink.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Ends tracking; whatever the tracker has to say, it says now."""
        if self.sink:
            self.sink.finish() if self.kind == "wandb" else self.sink.close()
