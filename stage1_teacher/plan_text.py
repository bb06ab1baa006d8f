"""A plan as text: its facts, a label and a line each, and the table of choices."""

from typing import Any

from stage1_teacher.ends import describe_ends

NOTE = (
    "mass: in the row, mean; KL: what the codec adds over row and tail at T=1, in nats; grad. error: relative, for an "
    "untrained student; next in row: share of the text's next tokens that are in the row"
)


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """A plan as lines of text; no figure is cut, however narrow a terminal is."""
    facts, table = plan_facts(plan), choice_rows(plan)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in table]
    return [*(f"{label:<10} {text}" for label, text in facts), *rows, NOTE]


def plan_facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What a plan says besides the choices of K."""
    teacher, data, batches, pilot = plan["teacher"], plan["data"], plan["batches"], plan["pilot"]
    size, hours, memory = plan["bytes"], plan["hours"], plan["memory"]
    bounds = "no bounds: under 3 pilot batches"
    if hours["low"] is not None:
        bounds = f"{_hours(hours['low'])} to {_hours(hours['high'])}"
    peaks = [f"{device} {_bytes(peak)}" for device, peak in memory["peak_bytes_by_device"].items()]
    peaks.append(f"resident {_bytes(memory['peak_resident_bytes'])}")
    head = "" if memory["head_bytes"] is None else f", float32 head and buffer {_bytes(memory['head_bytes'])}"
    parameters, license = f"{teacher['parameters'] / 1e6:,.1f} M parameters", teacher["license"] or "unknown"
    threads = f"{teacher['threads']} CPU thread{'s' if teacher['threads'] > 1 else ''}"
    device = f"{', '.join(teacher['devices'])}; {teacher['dtype']}, head {teacher['head']}; one process, {threads} "
    fits = "it fits" if size["fits"] else "IT MAY NOT FIT"
    lossy, targets = data["not_restored_by_the_tokenizer"], f"{data['tokens']:,} tokens, {data['targets']:,} of them"
    notice = [("notice", f"the float32 head cannot be used: {teacher['notice']}")] if teacher["notice"] else []
    return [
        ("teacher", f"{teacher['name']}, {parameters}, license {license}"),
        ("device", device + "(torchrun sets OMP_NUM_THREADS=1 unless it is set)"),
        *notice,
        ("data", f"{data['name']} {data['split']}: {data['documents']:,} documents, {targets} targets"),
        (
            "documents",
            f"{data['long']['documents']:,} too long ({data['long']['become']}), {lossy:,} not restored by the "
            "tokenizer",
        ),
        *describe_ends(plan["ends"]),
        ("lengths", ", ".join(f"≤{b['up_to']:,}: {b['documents']:,}" for b in data["lengths"])),
        ("batches", f"{batches['batches']:,} in {batches['shards']:,} shards, {batches['padding']:.1%} padding"),
        (
            "pilot",
            f"{pilot['documents']:,} documents, {pilot['tokens']:,} tokens, {pilot['batches']:,} batches in "
            f"{pilot['seconds']:,.1f} s",
        ),
        ("time", f"{_hours(hours['expected'])} ({bounds}), {hours['tokens_per_second']:,.0f} tokens/s"),
        (
            "worth it",
            f"N* = {hours['break_even_students']} students of one epoch each, or as many epochs of training in all: a "
            "live teacher labels the data anew in each",
        ),
        (
            "size",
            f"{_bytes(size['expected'])} ({_bytes(size['low'])} to {_bytes(size['high'])}); {_bytes(size['free'])} "
            f"free: {fits}",
        ),
        (
            "memory",
            f"weights {_bytes(memory['weight_bytes'])}{head}; peak {', '.join(peaks)} of "
            f"{_bytes(memory['machine_bytes'])}",
        ),
    ]


def choice_rows(plan: dict[str, Any]) -> list[list[str]]:
    """The table of choices: a header, then a row for each; the configured one is marked."""
    temperatures = list(plan["choices"][0]["captured_mass"])
    header = ["K", "top-p", "mean k", *(f"mass T={T}" for T in temperatures), "KL mean", "KL max", "grad. error"]
    table = [[*header, "next in row", "B/token", "size", ""]]
    for choice in plan["choices"]:
        kl, per_token = choice["codec_kl_nats"]["1"], choice["bytes_per_token"]["expected"]
        table.append(
            [
                f"{choice['top_k']}",
                "" if choice["top_p"] is None else f"{choice['top_p']:g}",
                f"{choice['mean_k']:.1f}",
                *(_figure(choice["captured_mass"][T], ".4f") for T in temperatures),
                _figure(kl["mean"], ".1e"),
                _figure(kl["max"], ".1e"),
                _figure(choice["gradient_error"], ".4f"),
                _figure(choice["next_token_in_row"], ".4f"),
                f"{per_token:.1f}",
                _bytes(per_token * plan["data"]["tokens"]),
                "← asked for" if choice["chosen"] else "",
            ]
        )
    return table


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
