"""`eval compare`: pairs that are alike, noise, change and loss; what cannot be compared is refused by name."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from shared.errors import ConfigError
from shared.eval.cli import evaluate
from shared.eval.report.compare import compare_files, mcnemar
from shared.files import read_json
from tests.support.report_fixture import (
    MACHINE,
    build_report,
    timing,
    verdict,
    write,
    write_benchmark,
    write_everything,
    write_fidelity,
    write_latency,
)


def fidelity(path, shift=0.0, *, documents=40, noise=0.0, **changes):
    """A fidelity.json whose documents' NLL is 2 a token, moved by `shift`; `noise` has mean 0 over documents."""
    wobble = np.tile([noise, -noise], documents // 2 + 1)[:documents]
    rows = [
        {"id": f"d{i}", "targets": 10, "nll_nats": 10 * (2 + shift + wobble[i]), "kl_nats": 5.0, "top1_agreed": 4}
        for i in range(documents)
    ]  # fmt: skip
    nll = sum(row["nll_nats"] for row in rows) / (10 * documents)
    whole = read_json(write_fidelity(path.parent / f".{path.name}", "student_kd"))
    return write(path, whole | {
        "nll_nats": nll, "kl_to_teacher_nats": 0.5, "top1_agreement": 0.4, "num_targets": 10 * documents,
        "reverse_kl_nats": None, "top5_agreement": None, "kl_kind": "partition K=8", "per_document": rows,
    } | changes)  # fmt: skip


def benchmark(folder, outcomes, **changes):
    """result.json and verdicts.jsonl of problems whose samples passed (1) or failed (0)."""
    rows = [
        verdict(f"t{i}", passed=bool(ok), sample=sample)
        for i, samples in enumerate(outcomes)
        for sample, ok in enumerate(samples)
    ]
    return write_benchmark(folder, rows, **changes)


def verdicts(a, b):
    return {row["figure"]: row["verdict"] for row in compare_files(a, b)["rows"]}


def test_a_result_against_itself_is_all_noise(tmp_path):
    a = fidelity(tmp_path / "a.json")
    rows = compare_files(a, a)["rows"]
    assert [row["verdict"] for row in rows] == ["noise"] * 3
    assert [row["ci95"] for row in rows] == [[0.0, 0.0]] * 3


def test_an_even_shift_is_found_with_its_size_and_noise_of_mean_zero_is_not(tmp_path):
    a = fidelity(tmp_path / "a.json")
    worse, noisy = fidelity(tmp_path / "b.json", 0.01), fidelity(tmp_path / "c.json", 0.01, noise=0.5)
    (row, *others) = compare_files(a, worse)["rows"]
    assert row["verdict"] == "worse" and row["ci95"] == pytest.approx([0.01, 0.01])
    assert {other["verdict"] for other in others} == {"noise"}
    assert verdicts(worse, a)["held-out NLL, nats per token"] == "better"
    (row, *_) = compare_files(a, noisy)["rows"]
    low, high = row["ci95"]
    assert row["verdict"] == "noise" and low < 0.01 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.1)


def test_too_few_documents_decide_nothing(tmp_path):
    few = [fidelity(tmp_path / f"{shift}.json", shift, documents=9) for shift in (0, 1)]
    assert set(verdicts(*few).values()) == {"unknown"}


def test_a_figure_that_is_lost_is_worse(tmp_path):
    lost = fidelity(tmp_path / "b.json", nll_nats=None, reasons={"nll_nats": "not finite (inf)"})
    (row, *_) = compare_files(fidelity(tmp_path / "a.json"), lost)["rows"]
    assert row["verdict"] == "worse" and row["how"] == "the figure is lost: not finite (inf)"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cache": {"digest": "cc", "label_identity": "l", "codec": "q", "teacher_nll_nats": None}}, "cache.digest"),
        ({"kl_kind": "dense"}, "kl_kind"),
        ({"seen_in_training": True}, "seen_in_training"),
        ({"documents": 41}, "num_targets"),
    ],
)
def test_fidelity_of_other_things_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=f"differs in {re.escape(named)}"):
        compare_files(fidelity(tmp_path / "a.json"), fidelity(tmp_path / "b.json", **changes))


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"), [(0, 0, 1.0), (0, 5, 0.0625), (0, 6, 0.03125), (3, 3, 1.0), (1, 8, 20 / 512)]
)
def test_mcnemar(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-12)


def test_one_sample_each_is_judged_by_mcnemar(tmp_path):
    a = benchmark(tmp_path / "a", [[0]] * 20)
    five, six = (benchmark(tmp_path / str(n), [[1]] * n + [[0]] * (20 - n)) for n in (5, 6))
    assert verdicts(a, five) == {
        "pass@1": "noise", "share of programs that pass an assert": "noise", "share of programs that run": "noise",
        "share of programs that parse": "noise",
    }  # fmt: skip
    assert verdicts(a, six)["pass@1"] == "better" and verdicts(six, a)["pass@1"] == "worse"
    assert compare_files(six, a)["rows"][0]["how"] == "McNemar's exact test: 0 gained, 6 lost, p = 0.0312"


def test_several_samples_are_judged_by_a_bootstrap_over_problems(tmp_path):
    a, b = benchmark(tmp_path / "a", [[0, 0]] * 20), benchmark(tmp_path / "b", [[0, 1]] * 20)
    (row, *_) = compare_files(a, b)["rows"]
    assert (row["verdict"], row["ci95"]) == ("better", [0.5, 0.5])


def test_other_problems_settings_or_verdicts_are_refused_by_name(tmp_path):
    a = benchmark(tmp_path / "a", [[0]] * 4)
    for changes, named in (
        ({"problems_sha256": "cc"}, "problems_sha256"),
        (
            {"settings": {"decoding": "greedy", "samples": 1, "max_new_tokens": 64, "timeout_seconds": 3.0}},
            "settings.max_new_tokens 128",
        ),
    ):
        with pytest.raises(ConfigError, match=named):
            compare_files(a, benchmark(tmp_path / "b", [[0]] * 4, **changes))
    benchmark(tmp_path / "b", [[1]] * 4)
    (tmp_path / "b" / "verdicts.jsonl").write_text((tmp_path / "a" / "verdicts.jsonl").read_text())
    with pytest.raises(ConfigError, match="not its own"):
        compare_files(a, tmp_path / "b" / "result.json")
    (tmp_path / "b" / "verdicts.jsonl").unlink()
    assert set(verdicts(a, tmp_path / "b" / "result.json").values()) == {"unknown"}


def latency(path, prefill, *, repeats=5, machine=MACHINE, **sizes):
    """A latency.json of one model, whose repeats of prefill lie between two times; decoding is always alike."""
    whole = read_json(write_latency(path.parent / f".{path.name}", machine=machine))
    model = timing("student_kd") | sizes
    model["batches"]["1"] |= {"prefill_ms": sum(prefill) / 2, "prefill_ms_range": list(prefill)}
    return write(path, whole | {"models": {"kd": model}, "settings": whole["settings"] | {"repeats": repeats}})


def test_times_change_where_the_repeats_lie_apart(tmp_path):
    a = latency(tmp_path / "a.json", (10, 12), parameters=100)
    assert verdicts(a, latency(tmp_path / "b.json", (12.1, 13), parameters=100)) == {
        "prefill, ms": "worse", "decode, tokens per second": "noise", "parameters": "noise",
        "weights on disk, bytes": "noise", "peak memory, bytes": "noise",
    }  # fmt: skip
    assert verdicts(a, latency(tmp_path / "b.json", (8, 9), parameters=90))["parameters"] == "changed"
    assert verdicts(a, latency(tmp_path / "b.json", (8, 9)))["prefill, ms"] == "better"
    assert verdicts(a, latency(tmp_path / "b.json", (11, 40)))["prefill, ms"] == "noise"
    few = [latency(tmp_path / f"{n}.json", (n, n), repeats=3) for n in (1, 2)]
    assert verdicts(*few)["prefill, ms"] == "unknown"


def test_times_of_other_machines_and_models_are_refused_by_name(tmp_path):
    a = latency(tmp_path / "a.json", (10, 12))
    with pytest.raises(ConfigError, match=r"machine\.host bench.*got: machine\.host other"):
        compare_files(a, latency(tmp_path / "b.json", (10, 12), machine=MACHINE | {"host": "other"}))
    other = json.loads(a.read_text())
    other["models"]["ce"] = other["models"].pop("kd")
    with pytest.raises(ConfigError, match="no model in common; expected: kd; got: ce"):
        compare_files(a, write(tmp_path / "b.json", other))


def test_two_reports_are_compared_model_by_model(tmp_path):
    for name, shift in (("a", 0.0), ("b", 0.1)):
        root = tmp_path / name
        fidelity(root / "eval" / "student_kd" / "fidelity.json", shift)
        benchmark(root / "eval" / "student_kd" / "humaneval", [[int(name == "b")]] * 20)
        write_latency(root)
        build_report(root / "eval", {}, [], root / "report")
    found = compare_files(*(tmp_path / name / "report" / "report.json" for name in "ab"))
    assert {row["verdict"] for row in found["rows"] if row["model"] == "teacher"} == {"noise"}
    mine = {row["figure"]: row["verdict"] for row in found["rows"] if row["model"] == "student_kd"}
    figures = ("held-out NLL, nats per token", "top-1 agreement", "pass@1")
    assert [mine[figure] for figure in figures] == ["worse", "noise", "better"]
    assert found["left_out"] == []


def test_reports_of_two_machines_leave_times_out_and_say_so(tmp_path):
    a = tmp_path / "a" / "report" / "report.json"
    build_report(**write_everything(tmp_path / "a"))
    other = json.loads(a.read_text())
    other["models"]["teacher"]["results"]["latency"]["machine"]["host"] = "other"
    left_out = compare_files(a, write(tmp_path / "b.json", other))["left_out"]
    assert len(left_out) == 1 and left_out[0].startswith("teacher: latency: the results cannot be compared")


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "{", '{"format": "codedistill-report"}'])
def test_what_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=r"a\.json"):
        compare_files(tmp_path / "a.json", tmp_path / "a.json")


def test_two_kinds_are_refused(tmp_path):
    a, b = write_fidelity(tmp_path, "student_kd"), write_latency(tmp_path)
    with pytest.raises(ConfigError, match=r"two kinds.*expected: fidelity; got: latency"):
        compare_files(a, b)


def test_the_gate_exits_with_1_where_it_is_worse_or_nothing_was_judged(tmp_path):
    a, worse = fidelity(tmp_path / "a.json"), fidelity(tmp_path / "b.json", 0.1)
    few, unknown = (fidelity(tmp_path / f"{name}.json", documents=9) for name in "cd")
    for b, options, code in (
        (worse, [], 0), (worse, ["--fail-on", "worse"], 1), (a, ["--fail-on", "worse"], 0),
        (unknown, ["--fail-on", "worse"], 1), (worse, ["--json"], 0),
    ):  # fmt: skip
        before = few if b is unknown else a
        done = CliRunner().invoke(evaluate, ["compare", str(before), str(b), *options])
        assert done.exit_code == code, done.output
        if "--json" in options:
            assert json.loads(done.output)["rows"][0]["verdict"] == "worse"
        elif b is worse:
            assert (
                "  worse   held-out NLL, nats per token  2 → 2.1, +0.1 [+0.1, +0.1]  (paired bootstrap" in done.output
            )
            assert done.output.endswith("1 worse, 2 noise\n")


def test_a_score_without_a_sandbox_is_not_compared_with_one_behind_walls(tmp_path):
    a = benchmark(tmp_path / "a", [[1], [0]])
    settings = read_json(a)["settings"] | {"sandbox": {"unsafe_no_sandbox": True}}
    b = benchmark(tmp_path / "b", [[1], [0]], settings=settings)
    with pytest.raises(ConfigError, match="run without a sandbox"):
        compare_files(a, b)


def test_what_passes_has_run_and_passed_an_assert(tmp_path):
    a, b = (benchmark(tmp_path / name, [[ok]] * 12) for name, ok in (("a", 0), ("b", 1)))
    assert verdicts(a, b)["share of programs that pass an assert"] == "better"
