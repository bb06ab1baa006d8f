"""`generate`: what a model writes, judged, sifted and read by `teacher build`."""

import json
import os
import time

import pytest
from click.testing import CliRunner

from data.humaneval import load_humaneval
from data.load import load_documents
from shared.cli import codedistill
from shared.eval.programs.style import answer_end, continuation
from shared.lock import Lock
from tests.support import warm
from tests.support.eval_models import save_model

OPTIONS = ["--samples", "5", "--max-new-tokens", "4", "--temperature", "0.9", "--dtype", "float32"]
PROMPT = 'def double(x):\n    """Twice x."""'
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'\n"
FREE = "def free(x):"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), positions=2048)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": 1, "prompt": PROMPT + "\n    ", "test": TEST, "entry_point": "double"}, {"id": 2, "prompt": FREE}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate(model, prompts, out, *options, code=0):
    arguments = ["generate", "--model", str(model), "--prompts", str(prompts), "--out", str(out), *OPTIONS, *options]
    done = CliRunner().invoke(codedistill, arguments)
    assert done.exit_code == code, (done.output, done.exception)
    return done


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(out, texts):
    """Other completions in place of those that the model made, and no result: the next run judges these."""
    lines = read(out / "completions.jsonl")
    assert len(lines) == len(texts)
    changed = [line | {"completion": text} for line, text in zip(lines, texts, strict=True)]
    (out / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    (out / "result.json").unlink()


WRITTEN = [
    "\n    return 2 * x\n",
    "\n    return 2 * x",  # the same text
    "\n    return 2 * (x)\n",  # the same tree
    "\n    return x + x  # a longer one\n",
    "\n    return x * x\n",  # wrong
    "\n    return x\n",
    "\n    return x\n\n",
    "\n    return (\n",  # no Python
    "\n    'A docstring.'\n    return x\n",  # the same but for the docstring
    "\n    while True: x += 1\n",
]


def test_what_is_kept_is_verified_unique_and_says_who_wrote_it(model, prompts, tmp_path):
    out = tmp_path / "out"
    generate(model, prompts, out)
    rewrite(out, WRITTEN)
    generate(model, prompts, out, "--license", "x", code=2)  # no such option
    generate(model, prompts, out)
    result, rows = json.loads((out / "result.json").read_text()), read(out / "documents.jsonl")
    assert [row["completion"] for row in rows] == [WRITTEN[0], WRITTEN[3], WRITTEN[5], WRITTEN[9]]
    assert result["counts"] == {"written": 10, "refused": 0, "parsed": 9, "unique": 4, "contaminated": 0, "kept": 4,
                                "passed": 4}  # fmt: skip
    assert result["verdicts"] == {"failed": 1, "passed": 4} and result["prompts"] == "prompts.jsonl"
    written = rows[0]["written"]
    assert rows[0]["id"] == "1/teacher/0" and rows[0]["prompt"] == PROMPT
    assert (written["origin"], written["verdict"], written["prompt_id"], written["sample"]) == (
        "teacher",
        "passed",
        "1",
        0,
    )
    assert written["settings"]["temperature"] == 0.9 and written["settings"]["seed"] == 0
    assert len(written["model_sha256"]) == 64 and rows[2]["written"]["verdict"] is None

    documents = load_documents(str(out / "documents.jsonl"), "train").documents
    assert [(d.id, d.origin, d.verdict) for d in documents] == [
        ("1/teacher/0", "teacher", "passed"), ("1/teacher/3", "teacher", "passed"),
        ("2/teacher/0", "teacher", None), ("2/teacher/4", "teacher", None)]  # fmt: skip
    assert "up to date" in generate(model, prompts, out).stderr
    assert load_documents(str(out / "documents.jsonl"), "train").license is None
    (out / "documents.jsonl").write_text("".join(json.dumps(
        row | {"written": row["written"] | {"license": "CC-BY-4.0"}}) + "\n" for row in rows))  # fmt: skip
    assert load_documents(str(out / "documents.jsonl"), "train").license == "CC-BY-4.0"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--keep", "parsed"], [0, 3, 4, 5, 9]),
        (["--keep", "all"], [0, 3, 4, 5, 7, 9]),
        (["--per-prompt", "1"], [0, 5]),
        (["--keep", "all", "--per-prompt", "2"], [0, 4, 5, 7]),  # the shortest
    ],
)
def test_how_much_is_kept(model, prompts, tmp_path, options, kept):
    out = tmp_path / "out"
    generate(model, prompts, out, *options)
    rewrite(out, WRITTEN)
    generate(model, prompts, out, *options)
    assert [row["completion"] for row in read(out / "documents.jsonl")] == [WRITTEN[i] for i in kept]


def test_a_random_choice_follows_from_the_seed(model, prompts, tmp_path):
    out, chosen = tmp_path / "out", []
    for _ in range(2):
        options = ["--keep", "all", "--per-prompt", "2", "--prefer", "random"]
        generate(model, prompts, out, *options)
        rewrite(out, WRITTEN)
        generate(model, prompts, out, *options)
        chosen.append((out / "documents.jsonl").read_bytes())
        (out / "result.json").unlink()
    assert chosen[0] == chosen[1] and chosen[0].count(b"\n") == 4


def test_benchmarks_are_neither_prompts_nor_written(model, prompts, tmp_path):
    problem, out = load_humaneval()[0], tmp_path / "out"
    body = "\n" + (problem.canonical_solution or "")
    head = problem.prompt.split('"""')[0].rstrip().replace("numbers", "values")
    prompts.write_text(json.dumps({"prompt": head}) + "\n")
    body = body.replace("numbers", "values")
    generate(model, prompts, out)
    rewrite(out, [body, body + "\n    # 1\n", "\n    return 1\n", "\n    return 2\n", "\n    return 3\n"])
    done = generate(model, prompts, out)
    result = json.loads((out / "result.json").read_text())
    assert result["contaminated"] == {"1/teacher/0": "HumanEval/0, solution"} and result["counts"]["kept"] == 3
    assert "not compared with mbpp:test" in done.stderr

    prompts.write_text(json.dumps({"id": "mine", "prompt": problem.prompt}) + "\n")
    done = generate(model, prompts, tmp_path / "no", code=1)
    assert "benchmark's test problem" in str(done.exception) and "mine; got: HumanEval/0" in str(done.exception)
    assert not (tmp_path / "no").exists()
    generate(model, prompts, tmp_path / "asked", "--benchmark-prompts", "humaneval", "--samples", "1")


def test_mistakes_are_named(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    for rows, message in (
        (['{"text": "x"}'], "field 'prompt'"),
        (['{"id": 1, "prompt": "x"}', '{"id": 1, "prompt": "y"}'], "each id once"),
        (['{"prompt": "x", "test": "def check(c): pass"}'], "field 'entry_point'"),
        (['{"prompt": "x", "test": "assert f(1)", "entry_point": "f"}'], "field 'test'"),
        (['{"prompt": "x", "test": 1}'], "field 'test'"),
        (['{"id": "2", "prompt": "x"}', '{"prompt": "y"}'], "each id once"),
    ):
        path.write_text("\n".join(rows) + "\n")
        assert message in str(generate(model, path, tmp_path / "out", code=1).exception)
    assert "unknown prompts" in str(generate(model, "nothing", tmp_path / "out", code=1).exception)
    path.write_text(json.dumps({"prompt": load_humaneval()[0].prompt}) + "\n")
    done = generate(model, path, tmp_path / "out", "--decontaminate", "none", code=1)
    assert "benchmark's test problem" in str(done.exception)
    done = generate(model, path, tmp_path / "out", "--benchmark-prompts", "auto", code=1)
    assert "where: benchmark_prompts" in str(done.exception)


def test_only_a_folder_of_its_own_is_written_to(model, prompts, tmp_path):
    out = tmp_path / "out"
    for name, content in (("documents.jsonl", '{"text": "mine"}\n'), ("verdicts.jsonl", ""), ("config.json", "{}")):
        out.mkdir()
        (out / name).write_text(content)
        assert f"got: {name}" in str(generate(model, prompts, out, code=1).exception)
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == content
        (out / name).unlink()
        out.rmdir()
    out.mkdir()
    lock = Lock(out)
    assert "another process is writing" in str(generate(model, prompts, out, code=1).exception)
    lock.release()
    assert "nothing was kept" in generate(model, prompts, out).stderr
    done = CliRunner().invoke(codedistill, ["eval", "exercises", "--model", str(model), "--out", str(out)])
    assert "the folder is of generate" in str(done.exception)
    (out / "documents.jsonl").write_text('{"written": "altered"}\n')
    generate(model, prompts, out)
    assert (out / "documents.jsonl").read_bytes() == b""


def test_trees_deeper_than_python_recurses_are_told_apart_by_their_text(model, prompts, tmp_path):
    out, deep = tmp_path / "out", "\n    return " + "x + " * 900 + "x\n"
    generate(model, prompts, out, "--keep", "parsed")
    rewrite(out, [deep, deep, deep.replace("+", "-"), *WRITTEN[:7]])
    generate(model, prompts, out, "--keep", "parsed")
    kept = [row["completion"] for row in read(out / "documents.jsonl") if len(row["completion"]) > 900]
    assert kept == [deep, deep.replace("+", "-")]


def test_a_kill_loses_no_finished_batch(model, prompts, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    slow = ["--samples", "40", "--batch-size", "2", "--max-new-tokens", "24", "--keep", "all"]
    generate(model, prompts, whole, *slow)
    command = ["generate", "--model", model, "--prompts", prompts, "--out", killed, *OPTIONS, *slow]
    process = warm.Command(*command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    part = killed / "completions.rank-0.jsonl"
    while process.poll() is None and not (part.exists() and part.stat().st_size > 2_000):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert part.exists() and not (killed / "documents.jsonl").exists()
    assert "completions are there already" in generate(model, prompts, killed, *slow).stderr
    assert (killed / "documents.jsonl").read_bytes() == (whole / "documents.jsonl").read_bytes()
    assert not part.exists()


PROGRAM = "\nimport math\n\ndef double(y):\n    '''Other.'''\n    z = y\n    return z * 2\n"
ANSWER = f"Sure:\n```python{PROGRAM}\nprint(double(1))\n```\nIt doubles.\n"


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (PROMPT, ANSWER, "\n    import math\n    z = y\n    return z * 2\n"),
        ("import math\n\n" + PROMPT, ANSWER, "\n    z = y\n    return z * 2\n"),
        (PROMPT, "```\nreturn x + x\n```", "\n    return x + x\n"),
        (PROMPT, "    return x\n", "\n    return x\n"),
        (
            '"""\nDouble.\n"""',
            ANSWER,
            "\nimport math\n\ndef double(y):\n    '''Other.'''\n    z = y\n    return z * 2\n",
        ),
        ('"""\nDouble.\n"""', '```python\n"""\nDouble.\n"""\ndef f(): return 1\n```', "\ndef f(): return 1\n"),
        (PROMPT, "```python\ndef double(x):\n    'only this'\n```", "\n"),
        (PROMPT, "```\ndef double(x): return x + x\n```", "\n    return x + x\n"),
        (PROMPT, "```\ndef double(x):\n    'é'; return x\n```", "\n    return x\n"),
        (PROMPT, "```\r\ndef double(x):\r\n  return x\r\n```", "\n    return x\n"),
        (PROMPT, "```\nA = '\x0c\u2028'\ndef double(x):\n    return x\n```", "\n    return x\n"),
        (
            PROMPT,
            "```\ndef double(x):\n    @cache\n    def f():\n        return x\n    return f()\n```",
            "\n    @cache\n    def f():\n        return x\n    return f()\n",
        ),
        (
            PROMPT,
            "```\ndef double(x):\n    y = '''\nno indentation\n'''\n    return y\n```",
            "\n    y = '''\nno indentation\n'''\n    return y\n",
        ),
        ('def double(x):\n  """Two spaces."""', ANSWER, "\n  import math\n  z = y\n  return z * 2\n"),
        ('def double(x):\n\t"""A tab."""', "```\nreturn x\n```", "\n\treturn x\n"),
    ],
)
def test_a_chats_answer_continues_the_prompt(prompt, answer, expected):
    assert continuation(prompt, answer) == expected


def test_an_answer_ends_with_its_first_block():
    assert answer_end(ANSWER) == ANSWER.index("```\nIt") + 3
    assert answer_end("```python\nx = 1\n") is None and answer_end("no code") is None
    assert answer_end("`" * 1_000_000) is None  # minutes where time were not linear
