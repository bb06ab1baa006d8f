"""HumanEval end to end: the canonical solutions pass, empty ones do not, and a model is scored by the command."""

import json

import pytest
from click.testing import CliRunner

from data.humaneval import load_humaneval
from shared.cli import codedistill
from shared.errors import ConfigError
from shared.eval import completion
from shared.eval.humaneval import score_completions, summarise
from shared.eval.sandbox.limited import Verdict
from tests.eval_models import save_model


def verdicts_of(complete):
    problems = load_humaneval()
    lines = [{"task_id": p.task_id, "completion": complete(p)} for p in problems]
    return [v.verdict for v in score_completions(problems, lines, timeout_seconds=15)]


def test_canonical_solutions_pass_through_the_cut():
    junk = "\n# Test\nprint(undefined)\n"
    assert verdicts_of(lambda p: completion.cut("\n" + p.canonical_solution + junk)) == ["passed"] * 164


def test_empty_completions_fail():
    assert verdicts_of(lambda p: "") == ["failed"] * 164


def test_the_command(tmp_path):
    model = save_model(tmp_path / "model", positions=1024)
    out = tmp_path / "out"
    options = ["--model", str(model), "--out", str(out), "--limit", "3", "--max-new-tokens", "20"]
    done = CliRunner().invoke(codedistill, ["eval", "humaneval", *options])
    assert done.exit_code == 0, done.output
    result = json.loads((out / "result.json").read_text())
    completions = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    ids = ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert [line["task_id"] for line in completions] == ids
    assert [line["task_id"] for line in verdicts] == ids
    assert (result["num_problems"], result["pass_at_1"], result["ci95"][0]) == (3, 0.0, 0.0)
    assert all(line["raw"].startswith(line["completion"]) for line in completions)
    assert completions[0]["settings"]["max_new_tokens"] == result["settings"]["max_new_tokens"] == 20


def test_unknown_tasks_are_refused_and_our_own_errors_are_no_score():
    with pytest.raises(ConfigError, match="HumanEval/999"):
        score_completions(load_humaneval(), [{"task_id": "HumanEval/999", "completion": ""}], timeout_seconds=3)
    summary = summarise([Verdict(verdict=v, detail="", seconds=0.0) for v in ("passed", "error")])
    reason = "1 programs could not be run"
    assert (summary["pass_at_1"], summary["ci95"]) == (None, None)
    assert summary["reasons"] == {"pass_at_1": reason, "ci95": reason}
