"""`eval compare`: pairs that are alike, noise, change and loss; what cannot be compared is refused by name."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from shared.errors import ConfigError
from shared.eval.cli import evaluate
from shared.eval.report.compare import compare_files, mcnemar
from shared.eval.report.report import build_report
from tests.support.report_fixture import MACHINE, write, write_everything, write_fidelity, write_latency


def fidelity(path, shift=0.0, *, documents=40, noise=0.0, **changes):
    """A fidelity.json whose documents' NLL is 2 a token, moved by `shift`; `noise` has mean 0 over documents."""
    wobble = np.tile([noise, -noise], documents // 2 + 1)[:documents]
    rows = [
        {"id": f"d{i}", "targets": 10, "labelled": 10, "nll_nats": 10 * (2 + shift + wobble[i]), "kl_nats": 5.0,
         "top1_agreed": 4}
        for i in range(documents)
    ]  # fmt: skip
    nll = sum(row["nll_nats"] for row in rows) / (10 * documents)
    return write(path, {
        "nll_nats": nll, "kl_to_teacher_nats": 0.5, "top1_agreement": 0.4, "num_targets": 10 * documents,
        "cache": {"manifest_sha256": "aa"}, "kl_kind": "partition K=8", "per_document": rows, "reasons": {},
    } | changes)  # fmt: skip


def benchmark(folder, outcomes, **changes):
    """result.json and verdicts.jsonl of problems whose samples passed (1) or failed (0)."""
    names = {1: "passed", 0: "failed"}
    rows = [
        {"task_id": f"t{i}", "sample": j, "parses": True, "verdict": names[ok], "loaded": bool(ok),
         "asserts_passed": 0}
        for i, samples in enumerate(outcomes) for j, ok in enumerate(samples)
    ]  # fmt: skip
    verdicts = [row["verdict"] for row in rows]
    result = write(folder / "result.json", {
        "benchmark": "HumanEval", "problems_sha256": "bb", "num_problems": len(outcomes), "share_parses": 1.0,
        "pass_at_1": sum(sum(s) / len(s) for s in outcomes) / len(outcomes),
        "verdicts": {name: verdicts.count(name) for name in sorted(set(verdicts))},
        "settings": {"decoding": "greedy", "max_new_tokens": 128},
    } | changes)  # fmt: skip
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return result


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


def test_too_few_documents_or_no_sums_decide_nothing(tmp_path):
    few = [fidelity(tmp_path / f"{shift}.json", shift, documents=9) for shift in (0, 1)]
    assert set(verdicts(*few).values()) == {"unknown"}
    old = [fidelity(tmp_path / f"old{shift}.json", shift, per_document=None) for shift in (0, 1)]
    assert set(verdicts(*old).values()) == {"unknown"}
    assert verdicts(old[0], fidelity(tmp_path / "new.json"))["top-1 agreement"] == "unknown"


def test_a_figure_that_is_lost_is_worse(tmp_path):
    lost = fidelity(tmp_path / "b.json", nll_nats=None, reasons={"nll_nats": "not finite (inf)"})
    (row, *_) = compare_files(fidelity(tmp_path / "a.json"), lost)["rows"]
    assert row["verdict"] == "worse" and row["how"] == "the figure is lost: not finite (inf)"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cache": {"manifest_sha256": "cc"}}, "cache.manifest_sha256"),
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
    assert verdicts(a, five) == {"pass@1": "noise", "share of programs that parse": "noise"}
    assert verdicts(a, six)["pass@1"] == "better" and verdicts(six, a)["pass@1"] == "worse"
    assert compare_files(six, a)["rows"][0]["how"] == "McNemar's exact test: 0 gained, 6 lost, p = 0.0312"


def test_several_samples_are_judged_by_a_bootstrap_over_problems(tmp_path):
    a, b = benchmark(tmp_path / "a", [[0, 0]] * 20), benchmark(tmp_path / "b", [[0, 1]] * 20)
    (row, *_) = compare_files(a, b)["rows"]
    assert (row["verdict"], row["ci95"]) == ("better", [0.5, 0.5])


def test_a_score_between_bounds_decides_nothing(tmp_path):
    reason = "between 0.0% and 50.0%, as 2 programs were not judged (T/0, T/1)"
    unknown = {"pass_at_1": None, "bounds": {"pass_at_1": [0.0, 0.5]}, "reasons": {"pass_at_1": reason}}
    a, b = benchmark(tmp_path / "a", [[0]] * 4), benchmark(tmp_path / "b", [[0]] * 4, **unknown)
    for before, after in ((a, b), (b, a)):
        row = compare_files(before, after)["rows"][0]
        assert (row["figure"], row["verdict"], row["how"]) == ("pass@1", "unknown", f"not known: {reason}")
    row = compare_files(b, benchmark(tmp_path / "c", [[0]] * 4, **unknown))["rows"][0]
    assert (row["verdict"], row["how"]) == ("unknown", f"not known: {reason}; {reason}")


def test_other_problems_settings_or_verdicts_are_refused_by_name(tmp_path):
    a = benchmark(tmp_path / "a", [[0]] * 4)
    for changes, named in (
        ({"problems_sha256": "cc"}, "problems_sha256"),
        ({"settings": {"decoding": "greedy", "max_new_tokens": 64}}, "settings.max_new_tokens 128"),
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
    model = {"prefill_ms": sum(prefill) / 2, "prefill_ms_range": list(prefill), **sizes}
    return write(path, {"models": {"kd": model}, "settings": {"threads": 2, "repeats": repeats}, "machine": machine})


def test_times_change_where_the_repeats_lie_apart(tmp_path):
    a = latency(tmp_path / "a.json", (10, 12), parameters=100)
    assert verdicts(a, latency(tmp_path / "b.json", (12.1, 13), parameters=100)) == {
        "prefill, ms": "worse", "decode, tokens per second": "unknown", "parameters": "noise",
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
    assert {row["verdict"] for row in found["rows"] if row["model"] == "teacher"} == {"noise", "unknown"}
    mine = {row["figure"]: row["verdict"] for row in found["rows"] if row["model"] == "student_kd"}
    figures = ("held-out NLL, nats per token", "top-1 agreement", "pass@1")
    assert [mine[figure] for figure in figures] == ["worse", "noise", "better"]
    assert found["left_out"] == []


def test_reports_of_two_machines_leave_times_out_and_say_so(tmp_path):
    a = tmp_path / "a" / "report" / "report.json"
    build_report(**write_everything(tmp_path / "a"))
    other = json.loads(a.read_text())
    other["models"]["teacher"]["machines"]["latency"]["host"] = "other"
    left_out = compare_files(a, write(tmp_path / "b.json", other))["left_out"]
    assert len(left_out) == 1 and left_out[0].startswith("teacher: latency: the results cannot be compared")


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "{"])
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
    unknown = fidelity(tmp_path / "c.json", per_document=None)
    for b, options, code in (
        (worse, [], 0), (worse, ["--fail-on", "worse"], 1), (a, ["--fail-on", "worse"], 0),
        (unknown, ["--fail-on", "worse"], 1), (worse, ["--json"], 0),
    ):  # fmt: skip
        done = CliRunner().invoke(evaluate, ["compare", str(a), str(b), *options])
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
    settings = {"decoding": "greedy", "max_new_tokens": 128, "sandbox": {"unsafe_no_sandbox": True}}
    b = benchmark(tmp_path / "b", [[1], [0]], settings=settings)
    with pytest.raises(ConfigError, match="run without a sandbox"):
        compare_files(a, b)


def test_what_passes_has_run_and_passed_an_assert(tmp_path):
    a, b = (benchmark(tmp_path / name, [[ok]] * 12, share_some_assert=float(ok)) for name, ok in (("a", 0), ("b", 1)))
    assert verdicts(a, b)["share of programs that pass an assert"] == "better"
