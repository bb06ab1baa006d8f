import json
import re

import pytest

from data.decontaminate import Index, Match, load_index
from data.humaneval import load_exercises, load_humaneval
from data.load import load_documents
from data.records import Document, Problem
from shared.errors import ConfigError

PROBLEM = load_humaneval()[0]  # has_close_elements
SOLUTION = PROBLEM.canonical_solution or ""
RENAMED = """class Checker:
    @staticmethod
    async def is_near(values, limit: float = 0.5):
        "Tell whether two values are close."
        for a, first in enumerate(values):
            # every pair
            for b, second in enumerate(values):
                if a != b:
                    gap: float = abs(first - second)
                    if gap < limit:
                        return True

        return False
"""
DEFAULT_FREE = RENAMED.replace(": float = 0.5", "")


@pytest.fixture(scope="module")
def index():
    return load_index("humaneval")


def text(code):
    return Document(id="x", source="s", completion=code)


@pytest.mark.parametrize(
    ("document", "rule"),
    [
        (text(PROBLEM.prompt + SOLUTION), "run"),
        (text('"""' + " ".join(PROBLEM.prompt.split()) + '"""\n'), "run"),  # white space changed
        (text(DEFAULT_FREE), "solution"),  # renamed, annotated, another docstring, nested, with comments
        (text("import os\n" + DEFAULT_FREE + "\n    def unfinished(self, (\n"), "solution"),  # the text is no Python
        (Document(id="c", source="s", messages=({"role": "user", "content": "Are two values close?"},
                  {"role": "assistant", "content": f"Yes:\n```python\n{DEFAULT_FREE}```\n"})), "solution"),
    ],
)  # fmt: skip
def test_planted_copies_are_found(index, document, rule):
    match = index.match(document)
    assert match is not None and (match.problem, match.rule) == ("HumanEval/0", rule)


@pytest.mark.parametrize(
    "code",
    [
        DEFAULT_FREE.replace("gap < limit", "gap <= limit"),  # another comparison
        RENAMED,  # another signature
        DEFAULT_FREE.replace("abs(", "norm("),  # another function is called
        DEFAULT_FREE.replace("return False", "return None"),
        "def add(x, y):\n    return x + y\n",  # HumanEval/53's body, which everybody would write
        "from typing import List\n\n\ndef has_close_elements(numbers: List[float], threshold: float):\n    pass\n",
        "primes = [" + ", ".join(map(str, range(200))) + "]\n",
    ],
)
def test_look_alikes_are_left_alone(index, code):
    assert index.match(text(code)) is None


def test_the_standard_library_shares_no_text_with_humaneval(index):
    documents = load_documents("stdlib", "validation").documents
    assert len(documents) > 100
    assert [document.id for document in documents if index.match(document)] == []


def test_whatever_a_function_binds_may_be_renamed():
    code = """def read(name, default):
    try:
        with open(name) as file:
            values = [float(line) for line in file]
    except OSError as error:
        print(error, name)
        return default
    return values
"""
    problem = Problem(task_id="P/0", prompt="", test="", entry_point="read", canonical_solution=code)
    index = Index({"mine": [problem]})
    copy = re.sub(r"\b(read|name|default|file|values|line|error)\b", r"\1_", code)
    assert index.match(text(copy)) == Match(problem="P/0", rule="solution")
    assert index.match(text(copy.replace("OSError", "ValueError"))) is None


@pytest.mark.parametrize(
    "hostile",
    [
        "def g(x):\n    return " + "x + " * 900 + "x\n",  # deeper than Python recurses
        "def g(x):\n    if x == 0: pass\n" + "    elif x == 1: pass\n" * 900,
        "(" * 999 + "\n",
        "\0\n",
        "def f(\n" * 999,
    ],
)
def test_a_copy_behind_hostile_text_is_found(index, hostile):
    assert index.match(text(hostile + DEFAULT_FREE)) == Match(problem="HumanEval/0", rule="solution")


@pytest.mark.parametrize("content", ["`" * 1_000_000, "```x" * 250_000, "```\n" * 250_000])
def test_fences_take_linear_time(index, content):
    chat = Document(id="c", source="s", messages=({"role": "assistant", "content": content},))
    assert index.match(chat) is None


def _bare(problem):
    """A problem's solution without the docstring."""
    return problem.prompt.split('"""')[0].rstrip() + "\n" + (problem.canonical_solution or "")


def test_every_problem_as_published_is_found():
    problems = {"humaneval": load_humaneval(), "exercises": load_exercises()}
    index = Index(problems)
    for name, of_name in problems.items():
        found = [index.match(text(p.prompt + "    return other(1)\n")) for p in of_name]
        assert [match and match.problem for match in found] == [p.task_id for p in of_name], name
    assert index.match(text(load_exercises()[0].prompt.replace("first", "head"))) is None


def test_every_solution_of_twenty_tokens_finds_its_own_problem():
    problems = load_humaneval()
    index = Index({"humaneval": problems})
    bodies = [p for p in problems if len((p.canonical_solution or "").split()) > 40 and p.prompt.count("def ") == 1]
    found = [index.match(text(_bare(p))) for p in bodies]
    assert len(bodies) > 20
    assert [match and match.problem for match in found] == [p.task_id for p in bodies]


def test_names_and_what_is_not_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert not load_index("none")
    with pytest.raises(ConfigError, match=r"unknown benchmark.*humaneval, mbpp:test, exercises; got: 'x'"):
        load_index("humaneval,x")
    index = load_index("auto")
    assert list(index.problems) == ["humaneval", "exercises"] and "not at hand" in index.absent["mbpp:test"]


def test_mbpps_own_file_gives_its_test_split(tmp_path):
    row = {"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""}
    file = tmp_path / "mbpp.jsonl"
    row["code"] = "def add(a, b):\n    return a + b\n"
    file.write_text("".join(json.dumps(row | {"task_id": id}) + "\n" for id in (11, 700)))
    index = load_index("mbpp:test", str(file))
    assert [problem.task_id for problem in index.problems["mbpp:test"]] == ["mbpp/11"]
