"""`codedistill cache simulate`."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("path", metavar="CACHE", type=click.Path(path_type=Path))
@click.option("--documents", metavar="N", default=20, show_default=True, help="Documents of the sample.")
@click.option("--teacher", metavar="DIR", type=click.Path(path_type=Path), help="Compare gradients with its own.")
@click.option("--student", metavar="DIR", type=click.Path(path_type=Path), help="Whose logits.  [default: all equal]")
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder for simulate.json and simulate.svg."
)
def simulate(path: Path, documents: int, teacher: Path | None, student: Path | None, out: Path | None) -> None:
    """Weigh fewer entries and other codecs on a sample, so that K is chosen by evidence.

    Each K up to the cache's own is encoded again with each codec. KL is that of the cached row to the decoded one, in
    nats, with the mass outside a row spread evenly over its ids (what a reader knows of them); coding KL is the part
    that quantising alone loses. Bytes are those of a shard of the sample.

    With --teacher the gradient that training forms from a row is compared with that of the teacher's whole distribution
    at T = 1: mean angle, and mean error relative to the latter's length, for --student's logits.
    """
    from shared.cache.simulate import sample_rows, top_ks
    from shared.cache.simulate import simulate as encode_variants

    if student is not None and teacher is None:
        raise click.UsageError("--student needs --teacher")
    source, rows = sample_rows(path, documents)
    variants = encode_variants(source, rows, top_ks(source.manifest["top_k"]))
    figures: list[dict[str, Any]] = [variant.figures() for variant in variants]
    if teacher is not None:
        from stage1_teacher.simulate import gradient_errors

        column = source.manifest["temperatures"].index(1.0)
        for row, errors in zip(figures, gradient_errors(path, rows, variants, teacher, student, column), strict=True):
            row |= errors
    _print(figures)
    if out is not None:
        from shared.files import write_json

        out.mkdir(parents=True, exist_ok=True)
        sample = {"documents": len(rows.doc_meta), "tokens": len(rows.tokens)}
        names = {"teacher": teacher and teacher.name, "student": student and student.name}
        write_json(out / "simulate.json", {"label_identity": source.manifest["label_identity"], **sample, **names,
                                           "variants": figures})  # fmt: skip
        _plot(figures, out / "simulate.svg")


def _print(figures: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("K", "codec", "B/token")
    for key in figures[0]["kl_nats"]:
        table.add_column(f"KL, T={key}")
    table.add_column("coding KL, T=1")
    measured = "angle_degrees" in figures[0]
    for title in ("angle", "relative error") if measured else ():
        table.add_column(title)
    for row in figures:
        cells = [str(row["top_k"]), row["codec"], f"{row['bytes_per_token']:.1f}"]
        cells += [f"{kl:.2e}" for kl in row["kl_nats"].values()] + [f"{row['coding_kl_nats']['1']:.1e}"]
        table.add_row(*cells, *([f"{row['angle_degrees']:.2f}°", f"{row['relative_error']:.4f}"] if measured else []))
    Console(width=120).print(table)


def _plot(figures: list[dict[str, Any]], file: Path) -> None:
    """Bytes per token against what is lost, one line per codec."""
    from matplotlib.figure import Figure

    measured = "angle_degrees" in figures[0]
    figure = Figure(figsize=(5.5 * (1 + measured), 4), layout="constrained")
    panels = [("kl_nats", "KL(cached ‖ decoded) at T = 1, nats")]
    panels += [("angle_degrees", "angle to the dense gradient, degrees")] if measured else []
    for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for codec in dict.fromkeys(row["codec"] for row in figures):
            rows = [row for row in figures if row["codec"] == codec]
            values = [row[key]["1"] if key == "kl_nats" else row[key] for row in rows]
            sizes = [row["bytes_per_token"] for row in rows]
            axes.plot(sizes, values, marker="o", label=codec)
            for row, x, y in zip(rows, sizes, values, strict=True):
                axes.annotate(f"{row['top_k']}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel="bytes per token", ylabel=label, xscale="log", yscale="log")
        axes.legend(title="codec; labels are K")
    figure.savefig(file)
