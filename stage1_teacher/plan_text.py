"""The plan for people: a table on a terminal, plain text elsewhere."""

from typing import Any


def plan_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What the plan says besides the choices of K: a label and a line each."""
    teacher, data, batches, pilot = plan["teacher"], plan["data"], plan["batches"], plan["pilot"]
    size, hours, memory = plan["bytes"], plan["hours"], plan["memory"]
    threads = teacher["threads"]
    bounds = "no bounds: under 3 pilot batches"
    head = "" if memory["head_bytes"] is None else f", float32 head and buffer {_bytes(memory['head_bytes'])}"
    if hours["low"] is not None:
        bounds = f"{_hours(hours['low'])} to {_hours(hours['high'])}"
    peaks = [f"{device} {_bytes(peak)}" for device, peak in memory["peak_bytes_by_device"].items()]
    facts = [
        (
            "teacher",
            f"{teacher['name']}, {teacher['parameters'] / 1e6:,.1f} M parameters, "
            f"licence {teacher['licence'] or 'unknown'}",
        ),
        (
            "device",
            f"{', '.join(teacher['devices'])}; {teacher['dtype']}, head {teacher['head']}; one process, {threads} "
            f"CPU thread{'s' if threads > 1 else ''} (torchrun sets OMP_NUM_THREADS=1 unless told otherwise)",
        ),
        (
            "data",
            f"{data['name']} {data['split']}: {data['documents']:,} documents, {data['tokens']:,} tokens, "
            f"{data['targets']:,} of them targets",
        ),
        (
            "documents",
            f"{data['long']['documents']:,} too long ({data['long']['become']}), "
            f"{data['not_restored_by_the_tokenizer']:,} not restored by the tokenizer",
        ),
        ("lengths", ", ".join(f"≤{b['up_to']:,}: {b['documents']:,}" for b in data["lengths"])),
        (
            "batches",
            f"{batches['batches']:,} in {batches['shards']:,} shards, {batches['padding']:.1%} padding",
        ),
        (
            "pilot",
            f"{pilot['documents']:,} documents, {pilot['tokens']:,} tokens, {pilot['batches']:,} batches in "
            f"{pilot['seconds']:,.1f} s",
        ),
        (
            "time",
            f"{_hours(hours['expected'])} ({bounds}), {hours['tokens_per_second']:,.0f} tokens/s",
        ),
        (
            "size",
            f"{_bytes(size['expected'])} ({_bytes(size['low'])} to {_bytes(size['high'])}); {_bytes(size['free'])} "
            f"free: {'it fits' if size['fits'] else 'IT MAY NOT FIT'}",
        ),
        (
            "memory",
            f"weights {_bytes(memory['weight_bytes'])}{head}; peak "
            f"{', '.join([*peaks, 'resident ' + _bytes(memory['peak_resident_bytes'])])} "
            f"of {_bytes(memory['machine_bytes'])}",
        ),
    ]
    if teacher["notice"]:
        facts.insert(2, ("notice", f"the float32 head cannot be used: {teacher['notice']}"))
    return facts


def choice_rows(plan: dict[str, Any]) -> list[list[str]]:
    """The table of choices: a header, then a row for each; the configured one is marked."""
    choices = plan["choices"]
    temperatures = list(choices[0]["captured_mass"])
    header = ["K", "top-p", "mean k", *(f"mass T={T}" for T in temperatures), "KL mean", "KL max", "next in row"]
    rows = [[*header, "B/token", "size", ""]]
    for choice in choices:
        kl, per_token = choice["codec_kl_nats"]["1"], choice["bytes_per_token"]["expected"]
        rows.append(
            [
                f"{choice['top_k']}",
                "" if choice["top_p"] is None else f"{choice['top_p']:g}",
                f"{choice['mean_k']:.1f}",
                *(_figure(choice["captured_mass"][T], ".4f") for T in temperatures),
                _figure(kl["mean"], ".1e"),
                _figure(kl["max"], ".1e"),
                _figure(choice["next_token_in_row"], ".4f"),
                f"{per_token:.1f}",
                _bytes(per_token * plan["data"]["tokens"]),
                "← asked for" if choice["chosen"] else "",
            ]
        )
    return rows


def print_plan(plan: dict[str, Any]) -> None:
    """Write the plan to standard output."""
    import click
    from rich.console import Console
    from rich.table import Table

    facts, (header, *rows) = plan_facts(plan), choice_rows(plan)
    note = "mass: in the row, mean; KL: what the codec adds over row and tail at T=1, in nats"
    console = Console()
    if not console.is_terminal:
        click.echo("\n".join(f"{label:<10} {text}" for label, text in facts))
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        for row in (header, *rows):
            click.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        click.echo(note)
        return
    summary, choices = Table(show_header=False), Table(*header, caption=note)
    for label, text in facts:
        summary.add_row(label, text)
    for row in rows:
        choices.add_row(*row)
    console.print(summary, choices)


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _figure(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
