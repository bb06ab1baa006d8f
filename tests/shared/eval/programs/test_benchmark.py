"""Benchmarks end to end: generated, killed and continued, made by several processes, run, scored."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from click.testing import CliRunner

from data.humaneval import load_humaneval
from data.templates import humaneval_prompt
from shared.cli import codedistill
from shared.errors import ConfigError, SandboxError
from shared.eval.programs import benchmark
from shared.eval.programs.benchmark import describe, score_completions, summarise
from shared.eval.programs.completion import body_end
from shared.eval.results import BenchmarkResult
from shared.eval.sandbox.runner import Verdict, open_sandbox
from shared.files import read_json
from shared.lock import Lock
from tests.support import warm
from tests.support.cache_faults import file_size_limit
from tests.support.eval_models import save_model, save_recurrent
from tests.support.hub_contents import mbpp_row
from tests.support.report_fixture import verdict, write_benchmark
from tests.support.small_device import limit_memory
from tests.support.wandb_runs import wandb_runs, wandb_summary

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Sampled, in float32, in batches of few: what must not change whoever makes it.
DECODING = ["--samples", "2", "--temperature", "0.9", "--top-p", "0.95", "--batch-size", "4", "--max-new-tokens", "24"]
DECODING += ["--limit", "8", "--dtype", "float32", "--timeout", "10"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), positions=2048)


def evaluate(name, model, out, *options, code=0):
    done = CliRunner().invoke(codedistill, ["eval", name, "--model", str(model), "--out", str(out), *options])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def read(out, name="completions"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def result_of(out):
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The run that nothing interrupts, by one process."""
    out = tmp_path_factory.mktemp("whole") / "humaneval"
    evaluate("humaneval", model, out, *DECODING)
    return out


# --- scoring ---------------------------------------------------------------------------------------------------------


def verdicts_of(complete):
    problems = load_humaneval()
    lines = [{"task_id": p.task_id, "prompt": humaneval_prompt(p), "completion": complete(p)} for p in problems]
    return [
        v.verdict for v in score_completions(problems, lines, sandbox=open_sandbox(unsafe=True), timeout_seconds=15)
    ]


def test_canonical_solutions_pass_through_the_cut():
    junk = "\n# Test\nprint(undefined)\n"

    def cut(problem):
        text = "\n" + problem.canonical_solution + junk
        return text[: body_end(text)]

    assert verdicts_of(cut) == ["passed"] * 164


def test_empty_completions_fail():
    assert verdicts_of(lambda p: "") == ["failed"] * 164


def test_unknown_tasks_are_refused():
    with pytest.raises(ConfigError, match="HumanEval/999"):
        lines = [{"task_id": "HumanEval/999", "prompt": "", "completion": ""}]
        score_completions(load_humaneval(), lines, sandbox=open_sandbox(unsafe=True), timeout_seconds=3)


def summary_of(rows, **options):
    """Of rows of verdicts: `+` passes, a digit fails after so many asserts, `x` does not load, `!` is our own error."""
    meaning = {"+": ("passed", True, 0), "x": ("failed", False, 0), "!": ("error", None, None)}
    meaning |= {str(i): ("failed", True, i) for i in range(3)}
    problems = load_humaneval()[: len(rows)]
    lines, verdicts = [], []
    for problem, row in zip(problems, rows, strict=True):
        for sign in row:
            verdict, loaded, asserts = meaning[sign]
            lines.append({"task_id": problem.task_id})
            verdicts.append(Verdict(verdict=verdict, detail="why", seconds=0.0, loaded=loaded, asserts_passed=asserts))
    return summarise(problems, lines, [True] * (len(lines) - 1) + [False], verdicts, **options)


def test_a_score_with_programs_that_were_not_judged_lies_between_two_bounds():
    """Four of five problems pass; of the fifth nothing is known, or only of one of its samples."""
    summary = summary_of(["+", "+", "+", "+", "!"])
    assert summary["pass_at_1"] is None
    assert summary["pass_at_k_bounds"] == {"1": [0.8, 1.0]}
    assert summary["not_judged"] == {load_humaneval()[4].task_id: "why"}
    sampled = summary_of(["++", "!0"])
    assert sampled["pass_at_k_bounds"] == {"1": [0.5, 0.75], "2": [0.5, 1.0]}
    assert summary_of(["+", "0"])["pass_at_k_bounds"] is None


def test_figures_of_samples():
    summary = summary_of(["++x0", "1xxx", "xxxx", "++++"])
    assert summary["pass_at_1"] == summary["pass_at_k"]["1"] == (0.5 + 0 + 0 + 1) / 4
    assert summary["pass_at_k"] == {"1": 0.375, "4": 0.5}
    assert summary["pass_at_k_ci95"]["1"] == summary["ci95"]
    assert (summary["num_problems"], summary["num_samples"], summary["num_passed"]) == (4, 16, 2)
    assert summary["verdicts"] == {"failed": 10, "passed": 6}
    assert (summary["share_parses"], summary["share_runs"], summary["share_some_assert"]) == (15 / 16, 8 / 16, 7 / 16)
    assert summary["reasons"] == {}


def test_no_k_beyond_the_samples_that_every_problem_has():
    assert list(summary_of(["+" * 12, "x" * 11])["pass_at_k"]) == ["1", "10", "11"]
    assert list(summary_of(["+", "x" * 11])["pass_at_k"]) == ["1"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["+", "!"], "1 of 2 problems could not be judged; pass@1 is between 50.0% and 100.0%"),
        (["+", ""], "1 problems have no completion"),
    ],
)
def test_what_is_incomplete_is_no_score(rows, reason, tmp_path):
    summary = summary_of(rows)
    unknown = ["pass_at_1", "ci95", "pass_at_k", "pass_at_k_ci95", "share_runs", "share_some_assert"]
    assert [summary[key] for key in unknown] == [None] * 6
    assert summary["reasons"] == dict.fromkeys(unknown, reason)
    result = read_json(write_benchmark(tmp_path, [verdict("t", passed=False)]))
    described = describe(BenchmarkResult.from_dict(result | summary | {"benchmark": "B"}, "here"))
    judged = "".join(f"\n  {task}: why" for task in summary["not_judged"])
    assert described == f"B: no score, since {reason}; see verdicts.jsonl{judged}"


# --- the commands ----------------------------------------------------------------------------------------------------


def test_sampled_humaneval(whole):
    result, completions, verdicts = result_of(whole), read(whole), read(whole, "verdicts")
    keys = [(f"HumanEval/{i}", sample) for i in range(8) for sample in (0, 1)]
    assert [(line["task_id"], line["sample"]) for line in completions] == keys
    assert [(line["task_id"], line["sample"]) for line in verdicts] == keys
    assert all(line["raw"].startswith(line["completion"]) for line in completions)
    assert all(a["raw"] != b["raw"] for a, b in zip(completions[::2], completions[1::2], strict=True))
    assert list(result["pass_at_k"]) == ["1", "2"]
    assert (result["pass_at_1"], result["ci95"][0], result["num_problems"], result["num_samples"]) == (0.0, 0.0, 8, 16)
    settings = completions[0]["settings"]
    wanted = {"decoding": "sampled", "samples": 2, "temperature": 0.9, "top_p": 0.95, "seed": 0, "max_new_tokens": 24}
    assert settings.items() >= wanted.items()
    assert result["settings"].items() >= settings.items()
    assert result["settings"]["sandbox"]


def test_more_samples_and_fewer_problems_leave_a_sample_as_it_is(model, whole, tmp_path):
    more = ["--samples", "3", "--limit", "2", "--batch-size", "3"]
    evaluate("humaneval", model, tmp_path, *DECODING, *more)
    made = {(line["task_id"], line["sample"]): line["raw"] for line in read(tmp_path)}
    before = {(line["task_id"], line["sample"]): line["raw"] for line in read(whole)}
    assert len(made) == 6
    assert {key: raw for key, raw in made.items() if key[1] < 2}.items() <= before.items()


def test_several_processes_make_the_same(model, whole, tmp_path):
    command = ["eval", "humaneval", "--model", model, "--out", tmp_path, *DECODING]
    codes, errors = warm.run_ranks(2, *command, env=ENVIRONMENT, timeout=200)
    assert codes == [0, 0], errors
    assert (tmp_path / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert result_of(tmp_path)["pass_at_k"] == result_of(whole)["pass_at_k"]
    assert errors.count("problems solved") == 1
    assert "Generating (rank 0 of 2): 8 completions" in errors


def test_a_batch_beyond_the_memory_is_made_in_halves(model, whole, tmp_path, monkeypatch):
    limit_memory(monkeypatch, benchmark, lambda model, ids_BT: len(ids_BT) > 3)
    said = evaluate("humaneval", model, tmp_path, *DECODING).stderr
    assert said.count("out of memory; 4 completions are made again as 2 and 2\n") == 4
    assert (tmp_path / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    limit_memory(monkeypatch, benchmark, lambda model, ids_BT: ids_BT.shape[1] > 1 and len(ids_BT) > 0)
    done = evaluate("humaneval", model, tmp_path / "one", *DECODING, code=1)  # `run_cli` says what to lower
    assert isinstance(done.exception, torch.OutOfMemoryError)


def test_killed_it_continues(model, whole, tmp_path):
    lines = tmp_path / "completions.rank-0.jsonl"
    process = warm.Command("eval", "humaneval", "--model", model, "--out", tmp_path, *DECODING, env=ENVIRONMENT)
    deadline = time.monotonic() + 250  # a busy machine takes long to start one
    while (
        (not lines.exists() or lines.read_bytes().count(b"\n") < 4)
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "result.json").exists()
    kept = lines.read_bytes().count(b"\n")
    assert 4 <= kept < 16
    with lines.open("ab") as file:  # as a kill in the middle of a write leaves it
        file.write((whole / "completions.jsonl").read_bytes()[:300])

    said = evaluate("humaneval", model, tmp_path, *DECODING).stderr
    assert f"{kept} of 16 completions are there already" in said
    assert "1 unreadable lines, as an interruption leaves them, are made anew" in said
    assert re.search(rf"Generating: {16 - kept} completions in .* completions/s, [\d,]+ tokens/s\)", said)
    assert (tmp_path / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert not lines.exists()


def test_a_finished_result_is_up_to_date_until_its_inputs_or_files_change(model, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = contents(out)
    for file in out.iterdir():
        os.utime(file, (0, 0))
    assert evaluate("humaneval", model, out, *DECODING).stderr == f"{out / 'result.json'} is up to date\n"
    assert contents(out) == before
    (out / "verdicts.jsonl").write_text("")
    assert "16 of 16 completions are there already" in evaluate("humaneval", model, out, *DECODING).stderr
    assert read(out) == read(whole) and len(read(out, "verdicts")) == 16
    said = evaluate("humaneval", model, out, *DECODING, "--timeout", "9").stderr
    assert "16 of 16 completions are there already" in said and result_of(out)["settings"]["timeout_seconds"] == 9
    assert result_of(out)["command"].endswith("--timeout 10 --timeout 9")


def test_other_settings_start_anew(model, whole, tmp_path):
    evaluate("humaneval", model, tmp_path, *DECODING)
    few = ["--max-new-tokens", "8"]
    for changes, name in ((few, "max_new_tokens"), ([*few, "--seed", "1"], "seed")):
        said = evaluate("humaneval", model, tmp_path, *DECODING, *changes).stderr
        assert f"has completions made with other settings ({name}): they are not reused" in said
        assert len(read(tmp_path)) == 16
    other = save_model(tmp_path / "other", seed=1, positions=2048)
    said = evaluate("humaneval", other, tmp_path, *DECODING, *few, "--seed", "1").stderr
    assert "made with other settings (model_sha256)" in said


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_finished_stays_until_its_replacement_is_whole(model, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = contents(out)
    assert sorted(before) == ["completions.jsonl", "problems.jsonl", "result.json", "verdicts.jsonl"]
    evaluate("humaneval", tmp_path / "nope", out, *DECODING, code=1)
    evaluate("humaneval", model, out, "--problems", str(tmp_path / "nope.jsonl"), code=1)
    assert contents(out) == before

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    other = [*DECODING, "--seed", "1", "--max-new-tokens", "4"]
    monkeypatch.setattr(benchmark, "score_completions", stop)
    evaluate("humaneval", model, out, *other, code=1)
    now = contents(out)
    assert now.pop("completions.rank-0.jsonl").count(b"\n") == 16
    assert now == before
    monkeypatch.undo()
    assert "16 of 16 completions are there already" in evaluate("humaneval", model, out, *other).stderr
    assert sorted(contents(out)) == sorted(before)
    assert (result_of(out)["num_problems"], len(read(out, "problems")), len(read(out))) == (8, 8, 16)


def test_a_smaller_evaluation_does_not_replace_a_larger_one(model, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = contents(out)
    for fewer in (["--limit", "4"], ["--samples", "1", "--seed", "1"]):
        error = evaluate("humaneval", model, out, *DECODING, *fewer, code=1).exception
        assert "a smaller evaluation would replace a larger one" in str(error) and f"where: {out}" in str(error)
        assert "at least 16 completions" in str(error) and "name another --out" in str(error)
    assert contents(out) == before


def test_two_evaluations_do_not_share_a_folder(model, tmp_path):
    with Lock(tmp_path):
        error = evaluate("humaneval", model, tmp_path, *DECODING, code=1).exception
    assert "another process is evaluating into this folder" in str(error)
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_rank_that_died_is_taken_up(model, whole, tmp_path):
    text = (whole / "completions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "completions.jsonl").write_text("".join(text[:3]))
    (tmp_path / "completions.rank-1.jsonl").write_text("".join(text[2:7]))
    said = evaluate("humaneval", model, tmp_path, *DECODING).stderr
    assert "7 of 16 completions are there already" in said
    assert (tmp_path / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert not list(tmp_path.glob("completions.rank-*"))


def test_mbpp(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = [mbpp_row(i) for i in (5, 11, 12, 600)]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    evaluate("mbpp", model, out, "--dataset", str(tmp_path / "mbpp.jsonl"), "--max-new-tokens", "8", "--timeout", "10")
    result = result_of(out)
    assert result["benchmark"] == "MBPP"
    stated = {"dataset": "mbpp.jsonl", "split": "test", "asserts_shown": "test_list"}
    assert result["about"].items() >= stated.items()
    assert result["about"]["asserts_graded"].startswith("test_list")
    assert (result["num_problems"], result["pass_at_1"]) == (2, 0.0)
    name = f"{tmp_path.name} mbpp"
    assert wandb_runs(tmp_path) == {name: (tmp_path.name, 0)}
    summary = wandb_summary(tmp_path, name)
    assert (summary["pass_at_1"], summary["pass_at_k/1"], summary["verdicts/failed"]) == (0, 0, 2)
    assert [line["task_id"] for line in read(out, "problems")] == ["mbpp/11", "mbpp/12"]
    prompt = '"""\nWrite a function to add 11 to a number.\nassert add_11(1) == 12\nassert add_11(0) == 11\n"""'
    assert read(out)[0]["prompt"] == prompt


def test_any_file_of_humaneval_s_form(model, tmp_path):
    row = {"task_id": "own/1", "prompt": "def f(x):\n", "entry_point": "f"}
    row["test"] = "def check(candidate):\n    assert candidate(1) == 1\n"
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    options = ["--benchmark", str(tmp_path / "own.jsonl"), "--max-new-tokens", "4"]
    evaluate("humaneval", model, tmp_path / "out", *options)
    result = result_of(tmp_path / "out")
    assert (result["benchmark"], result["about"]["file"], result["num_problems"]) == ("own", "own.jsonl", 1)
    evaluate("humaneval", model, tmp_path / "out", *options, "--problems", str(tmp_path / "own.jsonl"), code=2)


def test_a_prompt_beyond_the_positions_is_refused_and_counts_as_failed(tmp_path):
    model = save_model(tmp_path / "model", positions=64)
    test = "def check(candidate):\n    assert candidate(1) == 1\n"
    prompts = ["def f(x):\n", "def f(x):\n    # " + "x" * 90 + "\n    return x\n", "def f(y):\n"]
    rows = [{"task_id": f"own/{i}", "prompt": p, "entry_point": "f", "test": test} for i, p in enumerate(prompts)]
    problems = tmp_path / "own.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--benchmark", str(problems), "--max-new-tokens", "4", "--timeout", "10"]
    options += ["--samples", "2", "--temperature", "1"]
    said = evaluate("humaneval", model, tmp_path / "out", *options).stderr
    result = result_of(tmp_path / "out")
    reason = result["refused"]["own/1"]
    assert reason.startswith("a prompt the model cannot continue; where: own/1; expected: 1 to 63 tokens; got: ")
    assert (result["num_refused"], result["num_problems"], result["num_samples"]) == (1, 3, 6)
    assert (result["pass_at_1"], result["verdicts"]) == (0.0, {"failed": 6})
    assert f"refused, which counts as failed: {reason}" in said
    assert "prompts too long for the model, counted as failed: 1" in said
    completions, verdicts = read(tmp_path / "out"), read(tmp_path / "out", "verdicts")
    keys = [(f"own/{i}", sample) for i in range(3) for sample in (0, 1)]
    assert [(line["task_id"], line["sample"]) for line in completions] == keys
    assert [line["finish_reason"] == "refused" for line in completions] == [False, False, True, True, False, False]
    assert [line["detail"] for line in verdicts[2:4]] == [reason, reason]
    assert [line["parses"] for line in verdicts[2:4]] == [False, False]
    said = evaluate("humaneval", model, tmp_path / "out", *options, "--timeout", "9").stderr
    assert "4 of 4 completions are there already" in said

    problems.write_text(json.dumps(rows[1]) + "\n")
    done = evaluate("humaneval", model, tmp_path / "none", *options, code=1)
    assert str(done.exception).startswith("a prompt the model cannot continue")


def test_a_full_disk_is_named_and_what_fitted_is_kept(model, tmp_path):
    test = "def check(candidate):\n    assert candidate(1) == 1\n"
    rows = [{"task_id": f"own/{i}", "prompt": "def f(x):\n", "entry_point": "f", "test": test} for i in range(8)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--benchmark", str(tmp_path / "own.jsonl"), "--max-new-tokens", "4", "--batch-size", "2"]
    with file_size_limit(4000):
        done = evaluate("humaneval", model, tmp_path / "out", *options, code=1)
    assert isinstance(done.exception, OSError)
    assert done.exception.filename == str(tmp_path / "out" / "completions.rank-0.jsonl")
    kept = (tmp_path / "out" / "completions.rank-0.jsonl").read_bytes().count(b"\n")
    assert 2 <= kept < 8
    said = evaluate("humaneval", model, tmp_path / "out", *options).stderr
    assert f"{kept} of 8 completions are there already" in said
    assert [line["task_id"] for line in read(tmp_path / "out")] == [row["task_id"] for row in rows]


def test_options_that_cannot_be(model, tmp_path):
    for options, word in (
        (["--samples", "2"], "greedy decoding draws nothing"),
        (["--top-p", "0.5"], "greedy decoding draws nothing"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "1", "--top-p", "0"], "top-p"),
    ):
        assert word in str(evaluate("humaneval", model, tmp_path, *options, code=1).exception)


def test_without_walls_the_result_says_not_run(model, tmp_path, monkeypatch):
    def refuse(**options):
        raise SandboxError("no walls here", fix="--unsafe-no-sandbox")

    monkeypatch.setattr(benchmark, "open_sandbox", refuse)
    few = ["--limit", "2", "--max-new-tokens", "4"]
    said = evaluate("humaneval", model, tmp_path, *few).stderr
    result = result_of(tmp_path)
    reason = "not run: no walls here; fix: --unsafe-no-sandbox"
    assert f"HumanEval: {reason}" in said
    assert (result["pass_at_1"], result["num_passed"], result["num_problems"]) == (None, None, 2)
    assert result["reasons"]["pass_at_1"] == result["reasons"]["share_runs"] == reason
    assert 0 <= result["share_parses"] <= 1
    assert not (tmp_path / "verdicts.jsonl").exists()
    monkeypatch.undo()
    said = evaluate("humaneval", model, tmp_path, *few).stderr
    assert "2 of 2 completions are there already" in said
    assert result_of(tmp_path)["pass_at_1"] == 0.0


def test_a_recurrent_teacher_is_scored(tmp_path):
    """Rows that end at different times are none of its batches' concern."""
    model = save_recurrent(tmp_path / "model", "Mamba")
    evaluate("humaneval", model, tmp_path / "out", "--limit", "5", "--max-new-tokens", "40", "--batch-size", "4")
    result = read_json(tmp_path / "out" / "result.json")
    assert (result["num_problems"], result["settings"]["batch_size"]) == (5, 4)
    assert {line["task_id"] for line in read(tmp_path / "out")} == {f"HumanEval/{i}" for i in range(5)}
