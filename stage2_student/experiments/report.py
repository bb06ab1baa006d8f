"""A sweep's students side by side: one table and one plot."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
PANELS = {"nll_nats": "validation NLL, nats per token", "kl_to_teacher_nats": "KL to the teacher, nats per token"}


def rank_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first, by held-out NLL and then KL to the teacher; what has no figures last, in the order given."""
    keys = ("nll_nats", "kl_to_teacher_nats")
    return sorted(rows, key=lambda row: [math.inf if row[key] is None else row[key] for key in keys])


def table(rows: Sequence[Row]) -> str:
    """A Markdown table whose columns are aligned for a terminal too; swept settings first, figures in nats."""
    swept = _swept(rows)
    lines = [[*swept, "NLL", "KL", "parameters", "steps", "state"]]
    for row in rows:
        lines.append(
            [
                *(str(row["swept"].get(key, "–")) for key in swept),
                *(_number(row[key], ".4f") for key in ("nll_nats", "kl_to_teacher_nats")),
                *(_number(row[key], ",d") for key in ("parameters", "steps")),
                row["state"],
            ]
        )
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(
        "| " + " | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def plot(rows: Sequence[Row]) -> bytes | None:
    """Draw NLL and KL against each swept setting, every student a point, the best of each value joined; SVG.

    None where no student has figures.
    """
    import matplotlib
    from matplotlib.figure import Figure

    swept = _swept(rows)
    scored = [row for row in rows if row["nll_nats"] is not None]
    if not scored:
        return None
    with matplotlib.rc_context({"svg.hashsalt": "sweep", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(3.4 * len(swept) + 0.6, 5.2), layout="constrained")
        grid = figure.subplots(len(PANELS), len(swept), squeeze=False, sharey="row")
        for axes_row, (figure_key, label) in zip(grid, PANELS.items(), strict=True):
            axes_row[0].set_ylabel(label)
            for axes, key in zip(axes_row, swept, strict=True):
                points = [
                    (row["swept"][key], row[figure_key])
                    for row in scored
                    if key in row["swept"] and row[figure_key] is not None
                ]
                axes.set_xlabel(key)
                if not points:
                    continue
                numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x, _ in points)
                if not numeric:
                    points = [(str(x), y) for x, y in points]
                best = {x: min(y for other, y in points if other == x) for x, _ in points}
                order = sorted(best)
                axes.plot(order, [best[x] for x in order], color="#2050a0", linewidth=1)
                axes.scatter([x for x, _ in points], [y for _, y in points], color="#2050a0", s=18)
                if numeric and min(order) > 0 and max(order) >= 10 * min(order):
                    axes.set_xscale("log")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _swept(rows: Sequence[Row]) -> list[str]:
    """Every setting that the grid names, in its order."""
    return list(dict.fromkeys(key for row in sorted(rows, key=lambda row: -len(row["swept"])) for key in row["swept"]))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
