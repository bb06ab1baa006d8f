"""`eval score` and `eval sandbox-check`, as commands."""

import json

import pytest
from click.testing import CliRunner

from shared.cli import codedistill
from shared.errors import ConfigError, SandboxError
from shared.eval.sandbox import probe
from shared.eval.sandbox.runner import open_sandbox

PROBLEM = {
    "task_id": "T/0",
    "prompt": 'def f(x):\n    """Return x + 1."""\n',
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    "entry_point": "f",
}
GOOD, BAD = ({"task_id": "T/0", "completion": f"    return x{more}\n"} for more in (" + 1", ""))


def invoke(*arguments):
    return CliRunner().invoke(codedistill, ["eval", *arguments])


def score(tmp_path, completions, *options, problems=(PROBLEM,)):
    """Completions as text, or rows."""
    files = [tmp_path / name for name in ("p.jsonl", "c.jsonl", "out/v.jsonl")]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in problems))
    rows = completions if isinstance(completions, str) else "".join(json.dumps(row) + "\n" for row in completions)
    files[1].write_text(rows)
    words = zip(("--problems", "--completions", "--out"), map(str, files), strict=True)
    return invoke("score", *[word for pair in words for word in pair], *options), files[2]


@pytest.fixture(scope="module", autouse=True)
def isolation():
    try:
        open_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def test_a_verdict_for_each_line_in_order(tmp_path):
    extra = {**GOOD, "model": "someone else's", "completion_id": 7}
    done, out = score(tmp_path, [GOOD, BAD, extra, BAD], "--timeout", "20")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["verdict"] for line in lines] == ["passed", "failed", "passed", "failed"]
    assert all(line["task_id"] == "T/0" and line["seconds"] > 0 for line in lines)
    assert lines[1]["detail"] == "AssertionError"
    assert {line["sandbox"]["unsafe_no_sandbox"] for line in lines} == {False}
    assert "4 completions: 2 passed, 2 failed" in done.output


def test_a_completion_follows_the_prompt_that_its_line_says_was_continued(tmp_path):
    problem = PROBLEM | {"prompt": "def f(x):\n    y = x +\n"}
    ours = {"task_id": "T/0", "prompt": "def f(x):\n    y = x +", "completion": " 1\n    return y\n"}
    theirs = {"task_id": "T/0", "completion": " 1\n    return y\n"}
    chat = theirs | {"prompt": "Write a function."}
    done, out = score(tmp_path, [ours, theirs, chat], "--timeout", "20", problems=[problem])
    assert done.exit_code == 0, done.output
    verdicts = [json.loads(line)["verdict"] for line in out.read_text().splitlines()]
    assert verdicts == ["passed", "failed", "failed"]


def test_a_solution_is_the_whole_program_and_the_test_still_has_what_the_prompt_defines(tmp_path):
    """As in EvalPlus's samples: nothing of the prompt is lent to the program."""
    prompt = 'import math\ndef twice(x):\n    return 2 * x\n\ndef f(x):\n    """Return x + 1."""\n'
    test = "def check(candidate):\n    assert candidate(twice(1)) == 3\n"
    problem = PROBLEM | {"prompt": prompt, "test": test}
    rows = [
        {"solution": "def f(x):\n    return x + 1\n"},
        {"solution": "def f(x):\n    return math.floor(x + 1)\n"},  # its own import is missing
        {"solution": "import math\ndef f(x):\n    return math.floor(x + 1)\n", "completion": "    return None\n"},
        {"solution": None, "completion": "    return math.floor(x + 1)\n"},
        {"solution": prompt + "    return x + 1\n", "_identifier": "model"},
        {"solution": "def g(x):\n    return x + 1\n"},
    ]
    done, out = score(tmp_path, [{"task_id": "T/0"} | row for row in rows], "--timeout", "20", problems=[problem])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["verdict"] for line in lines] == ["passed", "failed", "passed", "passed", "passed", "failed"]
    assert lines[1]["detail"] == "NameError: name 'math' is not defined"
    in_one = problem | {"same_process": True}
    done, out = score(tmp_path, [{"task_id": "T/0"} | rows[4]], "--timeout", "20", problems=[in_one])
    assert json.loads(out.read_text())["verdict"] == "passed"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(GOOD) + "\n{\n", "line 2"),
        (json.dumps(GOOD) + '\n{"task_id": "T/0"}\n', "line 2, field 'completion'"),
        (json.dumps(GOOD) + '\n{"task_id": "T/0", "completion": null}\n', "line 2, field 'completion'"),
        ('{"task_id": 0, "completion": ""}\n', "line 1, field 'task_id'"),
        ('\n\n{"task_id": "T/9", "completion": ""}\n', "line 3, field 'task_id'"),
        ('{"task_id": "T/0", "completion": "\\ud800"}\n', "lone surrogate"),
        ('["T/0", ""]\n', "line 1"),
        ('{"task_id": "T/0", "solution": 1}\n', "line 1, field 'solution'"),
        ("", "no completions"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_written(tmp_path, text, said):
    done, out = score(tmp_path, text)
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)
    assert not out.exists()


def test_missing_problems_are_told(tmp_path):
    done, _ = score(tmp_path, [GOOD], "--timeout", "20", problems=[PROBLEM, {**PROBLEM, "task_id": "T/1"}])
    assert "1 of 2 problems have no completion, such as T/1" in done.output


def test_without_isolation_nothing_is_run_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "CHOICES", ())
    done, out = score(tmp_path, [GOOD])
    assert isinstance(done.exception, SandboxError) and not out.exists()
    done, out = score(tmp_path, [GOOD], "--unsafe-no-sandbox", "--timeout", "20")
    assert json.loads(out.read_text())["sandbox"] == {
        "isolation": "none",
        "unsafe_no_sandbox": True,
    }


def test_sandbox_check_says_what_holds_and_fails_where_nothing_does(monkeypatch):
    done = invoke("sandbox-check")
    assert done.exit_code == 0
    assert "network: refused" in done.output and "programs are scored behind: " in done.output
    monkeypatch.setattr("shared.eval.sandbox.worker._INTERPRETER", ("/nonexistent/python",))
    done = invoke("sandbox-check")
    assert isinstance(done.exception, SandboxError)
    assert "not here" in done.output
