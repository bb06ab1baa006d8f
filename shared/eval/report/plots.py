"""The report's plots, as inline SVG whose colours and fonts the page decides."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shared.eval.report.tables import number

# What matplotlib draws → the page's CSS variable, so that one drawing serves light, dark and print.
INK, GRID = "#101010", "#e0e0e0"
SERIES = ("#707070", "#2050a0", "#b06010", "#207050", "#803080", "#a02040")  # the teacher first
CSS_COLOURS = {INK: "var(--ink)", GRID: "var(--rule)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
WIDTH, HEIGHT = 4.4, 3.0  # inches; small, so that text stays readable on a narrow page


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One drawing: the heading above it, a caption below it, and what it shows in words for those who cannot see it."""

    title: str
    caption: str
    alt: str
    svg: str


def training_plot(logs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str, caption: str) -> Plot | None:
    """Draw one logged loss against the step, with its held-out counterpart `eval_<key>` where there is one.

    Args:
        logs: by the run's label, in the order of colours after the teacher's, the records of `training_log.jsonl`.
        key: the loss, in nats per token.
        title: the heading.
        caption: what the reader should know.
    """
    words = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for colour, (label, records) in zip(_cycle(1, len(logs)), logs.items(), strict=True):
            train, held_out = _series(records, key), _series(records, f"eval_{key}")
            if train:
                axes.plot(*zip(*train, strict=True), color=colour, label=_plain(label), alpha=0.45 if held_out else 1)
                words.append(f"{label}: from {train[0][1]:.2f} to {train[-1][1]:.2f} in training")
            if held_out:
                name = f"{label}, held out"
                axes.plot(*zip(*held_out, strict=True), color=colour, label=_plain(name), marker="o", markersize=3)
                words.append(f"{name}: {held_out[-1][1]:.2f} at the end")
        if not words:
            return None
        axes.set(xlabel="optimizer step", ylabel="nats per token")
        axes.grid(axis="y")
        axes.legend(fontsize=8)
        return Plot(title=title, caption=caption, alt=f"{title} by step. {'; '.join(words)}.", svg=_svg(figure, key))


def mass_plot(caches: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Plot | None:
    """Draw the teacher's probability mass inside the cached rows by temperature.

    Args:
        caches: by the cache's name, {temperature: {"mean", "p1", "p10"}}, shares in [0, 1].
    """
    if not caches:
        return None
    words = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for colour, (name, masses) in zip(_cycle(1, len(caches)), caches.items(), strict=True):
            points = sorted(
                (float(temperature), mass) for temperature, mass in masses.items() if mass["mean"] is not None
            )
            x = [temperature for temperature, _ in points]
            axes.plot(x, [m["mean"] for _, m in points], color=colour, marker="o", markersize=3.5, label=_plain(name))
            axes.plot(
                x, [m["p10"] for _, m in points], color=colour, linestyle=":", label=f"{_plain(name)}, 10th percentile"
            )
            words.append(f"{name}: " + ", ".join(f"{m['mean']:.3f} at T={t:g}" for t, m in points))
        axes.set(xlabel="temperature T", ylabel="mass inside the top-k", ylim=(0, 1.03), xticks=x)
        axes.grid(axis="y")
        axes.legend(fontsize=8, loc="lower left")
        return Plot(
            title="Teacher mass captured by the cache",
            caption="Mean over tokens of the probability that the cached ids hold; the rest is one tail value.",
            alt=f"Captured mass by temperature. {'; '.join(words)}.",
            svg=_svg(figure, "mass"),
        )


def fidelity_plot(models: Mapping[str, Sequence[tuple[float | None, Sequence[float] | None]]]) -> Plot | None:
    """Draw held-out NLL and KL to the teacher as bars with their 95 % intervals.

    Args:
        models: by label, teacher first: for NLL and KL the figure in nats per token, None where not measured, and its
            interval, None where unknown.
    """
    panels = [("NLL, nats per token", 0), ("KL to the teacher, nats per token", 1)]
    panels = [(name, i) for name, i in panels if any(values[i][0] is not None for values in models.values())]
    if not panels:
        return None
    words = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, len(panels) * (0.55 + 0.3 * max(len(models), 3))), layout="constrained")
        for axes, (name, i) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            for row, (colour, (label, values)) in enumerate(zip(_cycle(0, len(models)), models.items(), strict=True)):
                value, interval = values[i]
                end = value or 0
                axes.barh(row, end, color=colour, height=0.62)
                if value is not None and interval:
                    axes.plot(interval, (row, row), color=INK, linewidth=1)
                    end = max(end, interval[1])
                text = "not measured" if value is None else f"{value:.3f}"
                axes.annotate(text, (end, row), (3, 0), textcoords="offset points", va="center")
                words += [] if value is None else [f"{label} {name}: {value:.3f}{_interval(interval)}"]
            axes.set_yticks(range(len(models)), [_plain(label) for label in models])
            axes.invert_yaxis()
            axes.set_title(name)
            axes.margins(x=0.18)
            axes.set_xlim(left=0)
            axes.tick_params(axis="y", length=0)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
        return Plot(
            title="Held-out NLL and KL to the teacher",
            caption="Lower is better in both: NLL against the text, KL against the teacher's distribution. "
            "Lines: 95% intervals over documents, where known.",
            alt=f"Bars. {'; '.join(words)}.",
            svg=_svg(figure, "fidelity"),
        )


def tradeoff_plot(models: Mapping[str, tuple[float, float, int]]) -> Plot | None:
    """Draw speed against quality, with the size as the disc's area.

    Args:
        models: by label, teacher first, measured on one machine: (decode tokens per second, NLL in nats, parameters).
    """
    if len(models) < 2:
        return None
    words = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        largest = max(parameters for _, _, parameters in models.values())
        for colour, (label, (speed, nll, parameters)) in zip(_cycle(0, len(models)), models.items(), strict=True):
            area = max(1500 * parameters / largest, 20)
            axes.scatter(speed, nll, s=area, color=colour, alpha=0.8, linewidths=0)
            axes.plot([], [], color=colour, marker="o", linestyle="", markersize=5,
                      label=_plain(f"{label}, {parameters / 1e6:,.1f} M"))  # fmt: skip
            words.append(f"{label}: {speed:,.1f} tokens per second, NLL {nll:.3f}, {parameters:,} parameters")
        axes.set(xlabel="decoded tokens per second (right is faster)", ylabel="held-out NLL (lower is better)")
        axes.margins(x=0.15, y=0.25)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid()
        figure.legend(loc="outside upper center", fontsize=8, ncols=2)
        return Plot(
            title="Size, speed and quality",
            caption="A disc's area is the number of parameters. All speeds are from one machine.",
            alt=f"Scatter plot. {'; '.join(words)}.",
            svg=_svg(figure, "tradeoff"),
        )


def calibration_plot(models: Mapping[str, Sequence[Mapping[str, Any]]], order: Sequence[str]) -> Plot | None:
    """Draw how often the most likely id is right against how sure the model is of it.

    Args:
        models: by label the bins: mean `confidence`, `accuracy` and `count` of targets; the first two None where empty.
        order: all labels of the report, teacher first, for the colours.
    """
    if not models:
        return None
    words = []
    colours = dict(zip(order, _cycle(0, len(order)), strict=True))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        axes.plot((0, 1), (0, 1), color=INK, linestyle=":", linewidth=0.8)
        for label, bins in models.items():
            points = [
                (b["confidence"], b["accuracy"], b["count"])
                for b in bins
                if None not in (number(b.get("confidence")), number(b.get("accuracy")), number(b.get("count")))
            ]
            if not points:
                continue
            total = sum(count for _, _, count in points)
            x, y, counts = zip(*points, strict=True)
            axes.plot(x, y, color=colours[label], label=_plain(label))
            axes.scatter(x, y, s=[4 + 60 * n / total for n in counts], color=colours[label], linewidths=0)
            sure = sum(c * n for c, _, n in points) / total
            right = sum(a * n for _, a, n in points) / total
            words.append(f"{label}: on average {sure:.0%} sure, {right:.0%} right")
        axes.set(xlabel="probability of the most likely token", ylabel="share that is the text's token",
                 xlim=(0, 1), ylim=(0, 1))  # fmt: skip
        axes.grid()
        axes.legend(fontsize=8, loc="upper left")
        return Plot(
            title="Calibration on held-out text",
            caption="On the dotted line a model is as often right as it is sure; below it, it is too sure. "
            "A dot's size is its share of tokens.",
            alt=f"Reliability curves. {'; '.join(words)}.",
            svg=_svg(figure, "calibration"),
        )


def proof_plot(arms: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Draw each arm's difference to cross-entropy on the test set with its paired interval over seeds.

    Args:
        arms: in the table's order; `name`, and in `versus_ce` `difference` and `ci95` in nats, None where unknown.
    """
    known = [arm for arm in arms if arm["versus_ce"]["difference"] is not None]
    if not known:
        return None
    words = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 * WIDTH, 0.9 + 0.28 * len(known)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        for row, arm in enumerate(known):
            difference, interval = arm["versus_ce"]["difference"], arm["versus_ce"]["ci95"]
            colour = SERIES[1] if arm["versus_ce"].get("significant") else SERIES[0]
            if interval:
                axes.plot(interval, (row, row), color=colour)
            axes.plot(difference, row, color=colour, marker="o", markersize=4)
            words.append(f"{arm['name']}: {difference:+.3f}{_interval(interval, '+')}")
        axes.set_yticks(range(len(known)), [_plain(arm["name"]) for arm in known])
        axes.invert_yaxis()
        axes.margins(y=0.12)
        axes.set(xlabel="test NLL minus cross-entropy's, nats per token (left is better)")
        axes.grid(axis="x")
        return Plot(
            title="Against cross-entropy, over paired seeds",
            caption="Dots: mean over seeds; lines: 95% paired t-interval. Grey where the interval holds 0.",
            alt=f"Differences to cross-entropy. {'; '.join(words)}.",
            svg=_svg(figure, "proof"),
        )


def _interval(interval: Sequence[float] | None, sign: str = "") -> str:
    return f" ({interval[0]:{sign}.3f} to {interval[1]:{sign}.3f})" if interval else ""


def _plain(text: str) -> str:
    """A name as text and not as matplotlib's mathematics, on one line, and not longer than a drawing can hold."""
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= 40 else f"{text[:39]}…"


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.subplots()


def _cycle(first: int, count: int) -> list[str]:
    """The colours of `count` series; the teacher's is first and never given to a student."""
    return [
        SERIES[i] if i < len(SERIES) else SERIES[1 + (i - 1) % (len(SERIES) - 1)] for i in range(first, first + count)
    ]


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) where the key was logged; of a step logged again after a resume, the last."""
    return sorted({r["step"]: r[key] for r in records if r.get(key) is not None and "step" in r}.items())


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element: ids unique in the page, page colours, page font, scaled by its viewBox."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)
