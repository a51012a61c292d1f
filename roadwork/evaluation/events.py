"""What TensorBoard shows of an evaluation: everything that the report shows of the answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from roadwork.evaluation import plots
from roadwork.evaluation.errors import Joined
from roadwork.evaluation.figures import breakdown_figures
from roadwork.evaluation.photos import attention_words, worst_photos
from roadwork.monitoring.board import Board

ATTENTION = "the saved network's attention, pixels alone"
"""The errors are those of the chosen system, which may be an ensemble with metadata; the attention is one network's."""
_COLUMNS = ("n", "groups", "mcc", "mcc_interval", "accuracy", "precision", "recall", "f1", "fpr", "tpr")


def write_events(
    folder: str | os.PathLike[str], evaluation: Mapping[str, Any], joined: Joined, figures: Mapping[str, Any],
    options: Any, trial: str,
) -> None:  # fmt: skip
    """Writes a TensorBoard run of its own into `folder`, in place of what an earlier evaluation left there.

    evaluation: of `assess.evaluate`; joined: the chosen system's answers; figures: of `evaluation_figures`; options:
    the configuration; trial: what the training curves' run calls itself, so that both are one row of HPARAMS.
    """
    split, errors = evaluation["split"], evaluation["errors"]
    board = Board(folder, purge_step=0, layout=False)
    board.figures(0, {("data/map_of_draws" if name == "map" else f"{split}/{name}"): f for name, f in figures.items()})
    board.pr_curve(f"{split}/precision_recall", 0, joined.label, joined.probability)
    for row in evaluation["systems"]:
        board.scalars(0, {f"{split}/mcc_{row['name']}": row["mcc"], f"{split}/ece_{row['name']}": row["ece"]})
    board.figures(0, {f"{split}_by/{field}": figure for field, figure in breakdown_figures(errors)})
    for breakdown in errors["breakdowns"]:
        board.text(f"{split}_by/{breakdown['field']}", breakdown_table(breakdown))
    photos = worst_photos(joined.index, errors)
    for kind, listed in errors["worst"].items():
        pictures = [(photos[e["id"]], caption(e)) for e in listed if e["id"] in photos]
        if pictures:
            board.figures(0, {f"{split}_worst/{kind}": plots.errors_figure(pictures)})
    board.hparams(options, final_metrics(evaluation), trial)
    board.close()


def breakdown_table(breakdown: Mapping[str, Any]) -> str:
    """One breakdown of `errors.analyse` as a table in Markdown."""
    lines = [f"| {breakdown['field'].replace('_', ' ')} | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for row in breakdown["rows"]:
        cells = [_cell(None if row["one_class"] and name.startswith("mcc") else row[name]) for name in _COLUMNS]
        lines.append(f"| {row['value']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", breakdown["note"]])


def final_metrics(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """What HPARAMS compares: the chosen system's MCC and ECE, and the MCC on pixels alone; None: not scored."""
    by_name = {row["name"]: row["mcc"] for row in evaluation["systems"]}
    best: Mapping[str, Any] = next((row for row in evaluation["systems"] if row["chosen"]), {})
    alone = {f"mcc_{name}": by_name.get(name) for name in ("image_only", "image_only_224")}
    return {"mcc": best.get("mcc"), "ece": best.get("ece"), **alone}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return f"{value[0]:.3f} to {value[1]:.3f}"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def caption(error: Mapping[str, Any]) -> str:
    """What stands under a worst error: the answer of the chosen system, the photo, and where which network looked."""
    place = f"{error['city'] or 'unknown city'}, {error['weather']}, {error['daytime']}, {error['scene']}"
    attention = attention_words(error.get("attention", ()))
    return f"{error['probability']:.3f}  {error['id']}\n{place}" + (f"\n{ATTENTION}: {attention}" if attention else "")
