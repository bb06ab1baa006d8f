"""Problems to evaluate on: MBPP's rows, and files of HumanEval's form."""

import gzip
import json
from pathlib import Path

import pytest

from data.humaneval import load_humaneval, problems_digest, read_completions, read_problems
from data.load import load_documents
from data.mbpp import load_problems
from data.records import Problem
from data.templates import humaneval_prompt
from shared.errors import ConfigError
from shared.eval.programs.completion import ending_after, program_end

REAL_MBPP = Path(__file__).parents[3] / "shared/data/mbpp.jsonl"

FULL = {
    "task_id": 11,
    "text": "Write a function to add one.",
    "code": "def helper(x):\r\n\treturn x\r\ndef sum(x):\r\n\treturn helper(x) + 1",
    "test_setup_code": "",
    "test_list": ["assert sum(1) == 2", "assert sorted([sum(0),\r\n0]) == [0, 1]"],
    "challenge_test_list": ["assert sum(9) == 10"],
}
SANITIZED = {
    "task_id": 12,
    "prompt": "Write a function for the root.",
    "code": "def root(x): return x ** 0.5",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(root(4), 2)"],
}


def write(tmp_path, rows, name="problems.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_mbpp_row_as_a_problem(tmp_path):
    path = str(write(tmp_path, [FULL, SANITIZED, FULL | {"task_id": 601}]))
    problems, commit = load_problems(path, "test")
    assert commit is None
    assert problems == (
        Problem(
            task_id="mbpp/11",
            prompt='"""\nWrite a function to add one.\nassert sum(1) == 2\nassert sorted([sum(0),\n0]) == [0, 1]\n"""',
            test="def check(candidate):\n    sum = candidate\n    assert sum(1) == 2\n"
            "    assert sorted([sum(0),\n    0]) == [0, 1]\n",
            entry_point="sum",
            canonical_solution="\ndef helper(x):\n\treturn x\ndef sum(x):\n\treturn helper(x) + 1\n",
        ),
        Problem(
            task_id="mbpp/12",
            prompt='"""\nWrite a function for the root.\nassert math.isclose(root(4), 2)\n"""',
            test="def check(candidate):\n    root = candidate\n    import math\n    assert math.isclose(root(4), 2)\n",
            entry_point="root",
            canonical_solution="\ndef root(x): return x ** 0.5\n",
        ),
    )
    assert [humaneval_prompt(p) for p in problems] == [d.prompt for d in load_documents(path, "test").documents]


def test_a_test_that_uses_more_of_the_program_s_names_runs_in_its_process(tmp_path):
    row = FULL | {
        "code": "class Node: pass\ndef depth(node): return 1",
        "test_setup_code": "root = Node()",
        "test_list": ["assert depth(root) == 1"],
    }
    (problem,) = load_problems(str(write(tmp_path, [row])), "test")[0]
    assert (problem.entry_point, problem.same_process) == ("depth", True)
    own = FULL | {"test_list": ["assert [sum(i) for i in (lambda n: range(n))(2)] == [1, 2]"]}
    assert load_problems(str(write(tmp_path, [own])), "test")[0][0].same_process is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": "def f(x:"}, "field 'code'; expected: Python"),
        ({"code": "x = 1"}, "field 'test_list'; expected: a call of"),
        ({"test_list": ["assert sum(1) = 2"]}, "field 'test_list'; expected: Python"),
        ({"test_list": ['assert sum(1) == """a\nb"""']}, "mean the same when indented"),
        ({"test_list": ["from math import *", "assert sum(1) == 2"]}, None),
    ],
)
def test_rows_that_are_no_problem(tmp_path, changes, message):
    path = str(write(tmp_path, [FULL | changes]))
    if message is None:
        assert "from math" in load_problems(path, "test")[0][0].test
        return
    with pytest.raises(ConfigError, match=rf"problems.jsonl, line 1, .*{message}"):
        load_problems(path, "test")


def test_mbpp_is_the_hub_s_or_a_table():
    with pytest.raises(ConfigError, match=r"expected: mbpp, FILE.jsonl\[.gz\|.zst\] or FILE.parquet; got: 'mbpp.csv'"):
        load_problems("mbpp.csv", "test")


@pytest.mark.skipif(not REAL_MBPP.exists(), reason="the real MBPP file is not beside the repository")
def test_every_real_mbpp_row_is_a_problem():
    splits = ("prompt", "test", "validation", "train")
    problems = [problem for split in splits for problem in load_problems(str(REAL_MBPP), split)[0]]
    assert len(problems) == 974
    assert [p.task_id for p in problems if p.same_process] == ["mbpp/367", "mbpp/596", "mbpp/601", "mbpp/927"]
    assert {"check", "sum"} <= {p.entry_point for p in problems}
    assert all(ending_after(humaneval_prompt(p)) is program_end for p in problems)
    assert all(program_end(p.canonical_solution) is None for p in problems)


ROW = {
    "task_id": "a",
    "prompt": "def f():",
    "test": "def check(candidate):\n    assert candidate()",
    "entry_point": "f",
}


def test_files_of_humaneval_s_form(tmp_path, capsys):
    more = ROW | {"task_id": "b", "canonical_solution": None, "contract": "x", "same_process": True}
    path = write(tmp_path, [ROW, more])
    problems = read_problems(path)
    assert [(p.task_id, p.canonical_solution, p.same_process) for p in problems] == [
        ("a", None, False),
        ("b", None, True),
    ]
    packed = tmp_path / "HumanEvalPlus-OriginFmt.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_problems(packed) == problems
    assert capsys.readouterr().err == ""


def test_inputs_that_no_test_runs_are_said(tmp_path, capsys):
    """As in HumanEvalPlus.jsonl.gz, whose `test` is HumanEval's own."""
    rows = [ROW, ROW | {"task_id": "b", "plus_input": [[1], []]}]
    assert len(read_problems(write(tmp_path, rows, "HumanEvalPlus.jsonl"))) == 2
    assert "warning: HumanEvalPlus.jsonl holds HumanEval+'s inputs in plus_input" in capsys.readouterr().err


def test_completions_continue_the_prompt_and_solutions_are_whole_programs(tmp_path):
    rows = [
        {"task_id": "a", "completion": " return 1", "prompt": "def f():"},
        {"task_id": "a", "solution": "def f(): return 2", "completion": "pass", "_identifier": "x"},
        {"task_id": "b", "completion": ""},
    ]
    path = write(tmp_path, rows, "samples.jsonl")
    read = list(read_completions(path))
    assert [(c.task_id, c.text, c.is_program, c.prompt, c.row.where) for c in read] == [
        ("a", " return 1", False, "def f():", "samples.jsonl, line 1"),
        ("a", "def f(): return 2", True, None, "samples.jsonl, line 2"),
        ("b", "", False, None, "samples.jsonl, line 3"),
    ]
    packed = tmp_path / "samples.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [c.text for c in read_completions(packed)] == [c.text for c in read]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task_id": "a"}, "line 1, field 'completion'; expected: completion or solution; got: neither"),
        ({"task_id": "a", "solution": None}, "expected: completion or solution; got: neither"),
        ({"task_id": "a", "solution": 1}, "line 1, field 'solution'; expected: a string; got: int 1"),
        ({"task_id": 0, "solution": ""}, "line 1, field 'task_id'; expected: a string; got: int 0"),
        ({"solution": ""}, "line 1, field 'task_id'; expected: the field in every row"),
    ],
)
def test_malformed_completions_are_refused(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message):
        list(read_completions(write(tmp_path, [row])))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW], r"line 2, field 'task_id'; expected: each id once; got: 'a', as problems.jsonl, line 1"),
        ([ROW | {"entry_point": "f()"}], r"line 1, field 'entry_point'; expected: a function's name; got: 'f\(\)'"),
        ([ROW | {"test": "assert f() == 1"}], r"field 'test'; expected: a definition of check"),
        ([ROW | {"same_process": 1}], r"field 'same_process'; expected: true or false"),
        ([ROW | {"prompt": None}], r"field 'prompt'; expected: a string; got: null"),
        ([], "no problems in the file"),
    ],
)
def test_malformed_files_are_refused(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        read_problems(write(tmp_path, rows))


def test_the_digest_is_of_the_published_fields():
    problems = load_humaneval()
    assert problems_digest(problems) == "62eeaa082ca375405caa318234d2eadb3536c69ab5a5cbf7a70138aac686645c"
