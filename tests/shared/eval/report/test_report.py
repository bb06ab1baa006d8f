import base64
import hashlib
import html.parser
import itertools
import json
import re
import xml.etree.ElementTree

import pytest
from click.testing import CliRunner

from shared.cache.manifest import seal, unseal
from shared.checkpoints import model_digest
from shared.cli import codedistill
from shared.errors import CacheCorruptError, ConfigError
from shared.eval.cli import evaluate
from shared.eval.report.report import collect
from shared.eval.report.tables import FIGURES, count, ratio_text
from shared.eval.results import BENCHMARKS, Fidelity
from tests.support.eval_models import save_model
from tests.support.report_fixture import (
    MACHINE,
    build_report,
    write,
    write_cache,
    write_draft,
    write_everything,
    write_fidelity,
    write_humaneval,
    write_latency,
    write_run,
)
from tests.support.text_cache import make_text_cache

KEYS = ("parameters", "bytes", "heldout_nll_nats", "heldout_bits_per_byte", "kl_to_teacher_nats", "top1_agreement",
        "prefill_ms", "decode_tokens_per_second")  # fmt: skip


CACHE = {"digest": "c", "label_identity": "l", "codec": "q", "teacher_nll_nats": 1.4}


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("full")
    arguments = write_everything(root)
    return root, build_report(**arguments)


@pytest.fixture
def undrawn(monkeypatch):
    """Drawings take most of a report's time, and this test is about its text."""
    monkeypatch.setattr("shared.eval.report.plots.Plot.svg", lambda self, *_, **options: b"<svg/>")


def test_every_figure_arrives_in_report_json(full):
    root, report = full
    assert strict((root / "report" / "report.json").read_text()) == report
    assert list(report["models"]) == ["teacher", "student_kd", "student_ce"]
    student = report["models"]["student_kd"]
    assert student["embedding_share"] == 0.4857
    assert [student[key] for key in KEYS] == [5_181_312, 20_733_040, 4.631, 1.873, 2.482, 0.331, 9.8, 214.6]
    assert student["humaneval"] == {
        "benchmark": "HumanEval", "pass_at_1": 0.0, "num_problems": 164, "ci95": [0.0, 0.0229],
        "share_parses": 141 / 164,
        "share_runs": 141 / 164, "share_some_assert": 0.0, "pass_at_k": {"1": 0.0},
        "pass_at_k_ci95": {"1": [0.0, 0.0229]}, "sampled": False,
    }  # fmt: skip
    assert student["ci95"]["heldout_nll_nats"] == [4.631 - 0.08, 4.631 + 0.08] and "ece" not in student["ci95"]
    assert student["ci95"]["prefill_ms"] == [9.8 * 0.97, 9.8 * 1.08]
    assert [student[key] for key in ("reverse_kl_nats", "decode_ms_p95_batch_8", "draft_speedup")] == [
        1.5 * 2.482, 2.6 * (1000 / 214.6), 1.31,
    ]  # fmt: skip
    assert student["results"]["run"]["config"]["alpha"] == 0.7
    assert student["results"]["latency"]["machine"] == MACHINE
    power, draft = {"tokens_per_second_per_watt"}, {"acceptance_rate", "mean_accepted_length", "draft_speedup"}
    served = {key for key in FIGURES if key.startswith("served_")}
    unmeasured = [set(model["reasons"]) - {"mbpp", "exercises"} - served for model in report["models"].values()]
    assert all(served <= set(model["reasons"]) for model in report["models"].values())
    assert unmeasured == [power | draft, power, power | draft]
    assert set(report["models"]["teacher"]["ratios_to_teacher"].values()) == {1.0, None}
    assert student["ci95"]["acceptance_rate"] == [0.39, 0.43]
    assert student["ratios_to_teacher"]["decode_tokens_per_second"] == 214.6 / 17.3


def test_every_file_is_named_with_its_digest(full):
    root, report = full
    assert len(report["files"]) == 21
    for name, file in report["files"].items():
        assert file["sha256"] == hashlib.sha256((root / name).read_bytes()).hexdigest()


def test_the_headline_is_made_of_the_figures(full):
    assert full[1]["headline"] == [
        "The distilled student is 26× smaller than its teacher and decodes 12× faster.",
        "Its KL to the teacher is 2.482 nats per token, its cross-entropy baseline's 3.104 (difference −0.622, 95% "
        "interval −0.628 to −0.615).",
        "Its held-out NLL is 4.631 nats per token, its teacher's 1.412, its cross-entropy baseline's 4.587 (difference "
        "+0.044, 95% interval +0.030 to +0.058).",
        "HumanEval problems solved, greedy: teacher 12/164 (100% parse, 100% run), distilled student 0/164 (86% parse, "
        "86% run), cross-entropy baseline 0/164 (86% parse, 86% run).",
        "As its teacher's draft in speculative decoding, 41% of its tokens are accepted and the teacher runs at 1.31× "
        "its speed, its text unchanged.",
        "Over 5 paired seeds, of a smaller student on fewer documents, the test NLL of ghost K=64 differs from that of "
        "cross-entropy: −0.249 nats per token, 95% interval −0.270 to −0.228.",
    ]


def test_speed_is_as_served_where_all_models_were_timed_so(tmp_path):
    """On a GPU; eager decoding has a row of its own."""
    file = write_latency(tmp_path)
    result = json.loads(file.read_text())
    for model in result["models"].values():
        model["served"] = {"1": model["batches"]["1"] | {"decode_tokens_per_second": 1e9 / model["parameters"]}}
    write(file, result)
    report = build_report(tmp_path / "eval", {}, [], tmp_path / "report")
    student, teacher = (report["models"][name] for name in ("student_kd", "teacher"))
    ratio = teacher["parameters"] / student["parameters"]
    assert student["ratios_to_teacher"]["served_decode_tokens_per_second"] == pytest.approx(ratio)
    assert f"decodes {ratio:.0f}× faster" in report["headline"][0]
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| Decode, eager, tokens per second" in page and "| Decode, as served, tokens per second" in page
    del result["models"]["student_ce"]["served"]
    result["models"]["student_ce"]["not_served"] = "no graph"
    write(file, result)
    report = build_report(tmp_path / "eval", {}, [], tmp_path / "report")
    assert report["models"]["student_ce"]["reasons"]["served_decode_tokens_per_second"] == "no graph"
    result["models"]["student_ce"]["not_timed"] = {"served 1": "no memory"}
    write(file, result)
    report = build_report(tmp_path / "eval", {}, [], tmp_path / "report")
    assert report["models"]["student_ce"]["reasons"]["served_decode_tokens_per_second"] == "no memory"
    assert "decodes 12× faster" in report["headline"][0]


def test_student_and_baseline_are_compared_on_the_same_documents_and_problems(full):
    (pair,) = full[1]["differences"]
    assert (pair["student"], pair["baseline"], pair["reasons"]) == ("student_kd", "student_ce", [])
    rows = {row["figure"]: row for row in pair["rows"]}
    assert rows["held-out NLL, nats per token"]["verdict"] == "worse"
    assert rows["KL to the teacher, nats per token"]["verdict"] == "better"
    assert rows["reverse KL, nats per token"]["ci95"] == pytest.approx([1.5 * (2.482 - 3.104)] * 2)
    assert rows["HumanEval: pass@1"]["how"] == "McNemar's exact test: 0 gained, 0 lost, p = 1"
    lines = (full[0] / "report" / "report.md").read_text().splitlines()
    assert "| top-1 agreement | 32.2% | 33.1% | +0.9 pp | +0.9 pp to +0.9 pp | better |" in lines


@pytest.mark.usefixtures("undrawn")
def test_two_students_scored_on_different_documents_have_no_difference_but_a_reason(tmp_path):
    arguments = write_everything(tmp_path)
    file = tmp_path / "eval" / "student_ce" / "fidelity.json"
    write(file, json.loads(file.read_text()) | {"cache": CACHE | {"digest": "00"}})
    (pair,) = build_report(**arguments)["differences"]
    assert {row["figure"].split(":")[0] for row in pair["rows"]} == {"HumanEval"}
    assert "cache.digest" in pair["reasons"][0]


@pytest.mark.usefixtures("undrawn")
def test_a_draft_that_parts_in_one_precision_is_not_called_unchanged(tmp_path):
    arguments = write_everything(tmp_path)
    equality = {
        dtype: {"num_equal": equal, "num_prompts": 3, "first_differences": []}
        for dtype, equal in (("bfloat16", 2), ("float32", 3))
    }
    write_draft(tmp_path, "student_kd", equal_to_greedy=False, equality=equality, settings={"num_prompts": 3})
    result = build_report(**arguments)
    assert not any("unchanged" in sentence for sentence in result["headline"])
    assert any("not give exactly the teacher's greedy text in every precision" in text for text in result["caveats"])
    assert any("tried on only 3 prompts" in text for text in result["caveats"])
    assert "bfloat16 2/3, float32 3/3" in (tmp_path / "report" / "report.md").read_text()


def test_the_proof_is_shown_with_what_it_claims_and_what_not(full):
    lines = (full[0] / "report" / "report.md").read_text().splitlines()
    ghost = "| ghost K=64 | loss ghost, K 64, lr 0.0012, epochs 2 | 5.082 ± 0.011 | −0.249 (−0.270 to −0.228) | 0.002 "
    assert ghost + "| yes | 3.082 ± 0.014 | −0.498 (−0.540 to −0.456) |" in lines
    smoothing = "| label smoothing | loss ce, lr 0.0012, epochs 2 | 5.342 ± 0.011 | +0.011 (−0.007 to +0.029) | 0.31 "
    assert smoothing + "| no | 3.342 ± 0.014 | +0.022 (−0.014 to +0.058) |" in lines
    assert "| cross-entropy | loss ce, lr 0.0012, epochs 2 | 5.331 ± 0.011 | – | – | – | 3.331 ± 0.014 | – |" in lines


@pytest.mark.parametrize("proof", [{}, {"variants": [{}], "summary": []}, {"variants": 3, "summary": []}])
def test_a_proof_of_another_form_is_refused_by_key(tmp_path, proof):
    arguments = write_everything(tmp_path)
    write(arguments["proof_file"], proof or {"summary": []})
    with pytest.raises(ConfigError, match=r"proof\.json.*(variants|name)"):
        build_report(**arguments)


@pytest.mark.usefixtures("undrawn")
def test_a_student_of_any_name_has_the_run_without_soft_labels_as_its_baseline(tmp_path):
    arguments = write_everything(tmp_path)
    for old, new in (("student_kd", "kd"), ("student_ce", "plain")):
        (tmp_path / "eval" / old).rename(tmp_path / "eval" / new)
        arguments["runs"][new] = arguments["runs"].pop(old)
    (tmp_path / "eval" / "latency.json").unlink()
    report = build_report(**arguments)
    assert [(pair["student"], pair["baseline"]) for pair in report["differences"]] == [("kd", "plain")]
    assert report["headline"][0] == "kd is 26× smaller than its teacher."
    assert report["headline"][1].startswith(
        "Its KL to the teacher is 2.482 nats per token, its cross-entropy baseline's 3.1"
    )


def test_every_file_says_what_makes_it(full):
    root, report = full
    files = report["files"]
    assert all(file["figures"] and file["command"].startswith("codedistill ") for file in files.values())
    run = root / "students" / "student_kd"
    assert files["students/student_kd/run.json"]["command"] == f"codedistill student train --out {run}"
    assert files["eval/latency.json"]["command"] == "codedistill eval latency --model x=y"


def test_the_first_prompts_are_shown_with_what_the_models_write(full):
    root, report = full
    assert [prompt["task_id"] for prompt in report["prompts"]] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert report["prompts"][0] == {
        "benchmark": "HumanEval",
        "task_id": "HumanEval/0",
        "prompt": "def f(x):  # HumanEval/0",
        "answers": [
            {"label": "Teacher", "text": "    return x  # passed", "passed": 1},
            {"label": "Distilled student", "text": "    return x  # failed", "passed": 0},
            {"label": "Cross-entropy baseline", "text": "    return x  # failed", "passed": 0},
        ],
    }
    for suffix in ("html", "md"):
        assert (root / "report" / f"report.{suffix}").read_text().count("    return x  # ") == 9


def test_a_report_is_up_to_date_until_a_file_changes_or_a_page_is_damaged(tmp_path):
    arguments = write_everything(tmp_path)
    build_report(**arguments)

    def is_up_to_date():
        names = ("eval_dir", "runs", "caches", "proof_file", "out_dir")
        return collect(*(arguments[name] for name in names)).is_up_to_date(tmp_path / "report")

    assert is_up_to_date()
    page, manifest = tmp_path / "report" / "report.html", tmp_path / "cache-train" / "manifest.json"
    text = page.read_text()
    for path, changed in (
        (page, text + " "),
        (
            tmp_path / "eval" / "latency.json",
            (tmp_path / "eval" / "latency.json").read_text().replace("212.4", "212.5"),
        ),
        (manifest, seal(unseal(manifest.read_bytes()) | {"num_tokens": 1}).decode()),
    ):
        before = path.read_text()
        path.write_text(changed)
        assert not is_up_to_date(), path
        path.write_text(before)
        assert is_up_to_date()
    (tmp_path / "eval" / "student_ce" / "fidelity.json").unlink()
    assert not is_up_to_date()


def test_a_page_of_three_documents_of_the_last_finished_cache_stands_beside_the_report(tmp_path):
    make_text_cache(tmp_path / "train", ["unseen"])
    make_text_cache(tmp_path / "held", ["a = 1", "b = 2", "c = 3", "d = 4"], ids=["</a>", "b", "c", "d"])
    (tmp_path / "begun").mkdir()
    out = tmp_path / "report"
    arguments = (tmp_path / "eval", {}, [tmp_path / "train", tmp_path / "held", tmp_path / "begun"])
    report = build_report(*arguments, out)
    assert report["documents"] == {"cache": "held", "ids": ["</a>", "b", "c"]}
    page, documents = ((out / name).read_text() for name in ("report.html", "documents.html"))
    assert 'href="documents.html"' in page and "held: &lt;/a&gt;, b, c." in page
    assert "`documents.html`" in (out / "report.md").read_text()
    assert documents.count('role="listbox"') == 3
    assert collect(*arguments, None, out).is_up_to_date(out)
    (out / "documents.html").write_text(documents + " ")
    assert not collect(*arguments, None, out).is_up_to_date(out)
    (tmp_path / "held" / "shard-00000.h5").unlink()  # a cache of which only the manifest was copied
    report = build_report(*arguments, out)
    assert report["documents"]["reasons"]["documents"].startswith("a file of the cache is missing")
    assert "Documents of held are not shown: a file of the cache is missing" in (out / "report.html").read_text()
    assert not (out / "documents.html").exists()


def test_a_manifest_whose_seal_is_broken_is_refused_by_name(tmp_path):
    arguments = write_everything(tmp_path)
    manifest = tmp_path / "cache-train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_tokens": 71020', '"num_tokens": 71021'))
    with pytest.raises(CacheCorruptError, match=re.escape(str(manifest))):
        build_report(**arguments)


def test_the_command_returns_at_once_where_nothing_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = write_everything(tmp_path)
    command = ["report", "--eval", str(tmp_path / "eval"), "--out", str(tmp_path / "report")]
    command += [f"--student={name}={run}" for name, run in arguments["runs"].items()]
    done = CliRunner().invoke(evaluate, command)
    assert done.exit_code == 0 and done.stdout.startswith("The distilled student is 26× smaller"), done.output
    page = tmp_path / "report" / "report.html"
    again = CliRunner().invoke(evaluate, command)
    assert (again.exit_code, again.output) == (0, f"{page} is up to date\n")


@pytest.mark.usefixtures("undrawn")
def test_a_baseline_that_differs_in_more_than_the_teacher_is_said(tmp_path):
    arguments = write_everything(tmp_path)
    file = arguments["runs"]["student_ce"] / "run.json"
    record = json.loads(file.read_text())
    record["config"]["seed"] = 1
    write(file, record)
    assert any(
        "they differ in seed (0, the baseline's 1)" in sentence for sentence in build_report(**arguments)["caveats"]
    )


def test_samples_are_told_by_pass_at_k_and_not_as_problems_solved(tmp_path):
    write_humaneval(
        tmp_path, "teacher", pass_at_1=0.071, pass_at_k={"1": 0.071, "10": 0.201}, pass_at_k_ci95={"1": [0.05, 0.1]},
        settings={"decoding": "sampled", "samples": 10},
    )  # fmt: skip
    build_report(tmp_path / "eval", {}, [], tmp_path / "report")
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert "| HumanEval pass@1 ↑ | 7.1% (4.2%–12.3%) |" in lines and "| HumanEval pass@10 ↑ | 20.1% |" in lines


def test_the_caveats_say_what_is_unfavourable(full):
    text = " ".join(full[1]["caveats"])
    assert "One seed proves nothing" in text
    assert "4.631 nats per token, worse than its baseline's 4.587" in text
    assert "distilled student 0/164 (95% interval 0.0% to 2.3%)" in text
    assert "A score of 0 cannot rank two students" in text
    assert "partition K=64" in text
    assert "taken on (Example CPU @ 2.40GHz, 2 cores, no accelerator)" in text
    assert "The teacher is small (134.5 M parameters)" in text


def test_markdown_table(full):
    lines = (full[0] / "report" / "report.md").read_text().splitlines()
    assert "| | Teacher | Distilled student | Cross-entropy baseline |" in lines
    assert "| Output equal to plain greedy decoding | – | yes | – |" in lines
    assert "| Parameters | 134.5 M | 5.2 M (26× smaller) | 5.2 M (26× smaller) |" in lines
    nll = "| Held-out NLL, nats per token ↓ | 1.412 (1.332–1.492) | 4.631 (4.551–4.711; +3.219) |"
    assert any(line.startswith(nll) for line in lines)


class Page(html.parser.HTMLParser):
    VOID = frozenset({"meta", "link", "img", "source", "br", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_one_accessible_page_without_requests(full):
    text = (full[0] / "report" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe"} & set(names)
    assert not re.search(r"https?://|url\(|@import", text)
    sources = [a[key] for _, a in page.tags for key in ("href", "src", "srcset") if key in a]
    assert len(sources) == 14 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    drawings = [base64.b64decode(source.partition(",")[2]).decode() for source in sources]
    assert all(xml.etree.ElementTree.fromstring(drawing).tag.endswith("svg") for drawing in drawings)
    assert all(
        "#e6e8eb" in dark and "#e6e8eb" not in light for dark, light in zip(drawings[::2], drawings[1::2], strict=True)
    )
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert names.count("table") == names.count("caption") == 4
    headings = [int(name[1]) for name in names if re.fullmatch("h[1-6]", name)]
    assert headings[0] == 1 and all(later <= earlier + 1 for earlier, later in itertools.pairwise(headings))
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for tag, attributes in page.tags if tag == "th")
    labels = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(labels) == 7
    assert "ghost K=64: -0.249 (-0.270 to -0.228)" in labels[0]
    assert "Distilled student KL to the teacher, nats per token: 2.482 (2.432 to 2.532)" in labels[1]


def test_a_second_report_has_the_same_bytes(full, tmp_path):
    root, _ = full
    before = {path.name: path.read_bytes() for path in (root / "report").iterdir()}
    build_report(**write_everything(root))
    assert {path.name: path.read_bytes() for path in (root / "report").iterdir()} == before


def test_without_results_nothing_is_written_and_nothing_tracked(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.tracking.start", lambda *a, **k: pytest.fail("a W&B run was opened"))
    folder = tmp_path / "eval"
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "notes.json").write_text("{}")
    done = CliRunner().invoke(codedistill, ["eval", "report", "--eval", str(folder), "--out", str(tmp_path / "report")])
    assert done.exit_code == 1
    assert str(done.exception).startswith(f"no results to report; where: {folder}; expected: latency.json, or folders")
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]
    write_fidelity(tmp_path, "student_kd")
    report = build_report(folder, {}, [], tmp_path / "report")
    assert list(report["models"]) == ["teacher", "student_kd"]


def test_a_cache_of_which_nothing_is_measured(tmp_path):
    report = build_report(tmp_path / "eval", {}, [tmp_path / "cache"], tmp_path / "report")
    assert report["headline"] == ["No student has been measured yet."]
    teacher = report["models"]["teacher"]
    assert all(teacher[key] is None for key in KEYS)
    assert teacher["reasons"]["heldout_nll_nats"] == "not measured: there is no fidelity.json for this model"
    assert set(teacher["reasons"]) == {*FIGURES, *BENCHMARKS}
    assert "<img" not in (tmp_path / "report" / "report.html").read_text()


SUBSETS = {
    "fidelity": lambda root: write_fidelity(root, "student_kd"),
    "latency": lambda root: write_latency(root, ("student_kd",)),
    "humaneval": lambda root: write_humaneval(root, "student_kd"),
    "run": lambda root: write_run(root, "student_kd"),
    "cache": lambda root: write_cache(root, "cache"),
}


@pytest.mark.parametrize("subset", SUBSETS)
def test_any_single_result_makes_a_report(tmp_path, subset):
    written = SUBSETS[subset](tmp_path)
    runs = {"student_kd": written} if subset == "run" else {}
    report = build_report(tmp_path / "eval", runs, [written] if subset == "cache" else [], tmp_path / "report")
    assert len(report["files"]) == {"run": 2, "humaneval": 3}.get(subset, 1)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "report.html"}


def test_the_teachers_nll_comes_from_the_cache_where_it_was_not_scored(tmp_path):
    write_fidelity(tmp_path, "student_kd")
    teacher = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["models"]["teacher"]
    assert teacher["heldout_nll_nats"] == 1.411
    assert "heldout_nll_nats" not in teacher["reasons"] and "kl_to_teacher_nats" in teacher["reasons"]


def test_times_of_two_machines_have_no_ratio(tmp_path):
    for name, host in (("teacher", "big"), ("student_kd", "small")):
        write_latency(tmp_path, (name,), machine=MACHINE | {"host": host})
    student = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["models"]["student_kd"]
    assert student["prefill_ms"] == 9.8
    known = {key for key, ratio in student["ratios_to_teacher"].items() if ratio is not None}
    assert known == {"parameters", "bytes", "memory_bytes", "peak_bytes"}


def test_a_results_own_reason_is_kept(tmp_path):
    file = write_fidelity(tmp_path, "teacher")
    write(file, json.loads(file.read_text()) | {"nll_nats": None, "reasons": {"nll_nats": "no targets"}})
    teacher = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["models"]["teacher"]
    assert teacher["reasons"]["heldout_nll_nats"] == "no targets"


def test_an_incomplete_humaneval_has_no_score(tmp_path):
    write_humaneval(
        tmp_path, "teacher", pass_at_1=None, ci95=None, pass_at_k=None, pass_at_k_ci95=None,
        reasons={"pass_at_1": "3 programs could not be run"},
    )  # fmt: skip
    teacher = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["models"]["teacher"]
    assert teacher["reasons"]["humaneval"] == "3 programs could not be run"
    assert "| HumanEval solved (greedy pass@1) ↑ | – |" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_benchmark_has_the_name_that_its_result_gives_it(tmp_path):
    arguments = write_everything(tmp_path)
    for name in ("teacher", "student_kd"):
        write_humaneval(tmp_path, name, benchmark="HumanEvalPlus")
    report = build_report(**arguments)
    assert [sentence for sentence in report["headline"] if "solved" in sentence] == [
        "HumanEvalPlus problems solved, greedy: teacher 12/164 (100% parse, 100% run), distilled student 0/164 (86% "
        "parse, 86% run).",
        "HumanEval problems solved, greedy: cross-entropy baseline 0/164 (86% parse, 86% run).",
    ]
    assert report["models"]["teacher"]["humaneval"]["benchmark"] == "HumanEvalPlus"
    figures = {name: file["figures"] for name, file in report["files"].items() if "teacher/humaneval" in name}
    assert figures == {
        "eval/teacher/humaneval/result.json": "HumanEvalPlus",
        "eval/teacher/humaneval/verdicts.jsonl": "HumanEvalPlus, problem by problem",
        "eval/teacher/humaneval/completions.jsonl": "HumanEvalPlus, what the models write",
    }
    assert report["differences"][0]["reasons"] == [
        "humaneval: the results cannot be compared: the benchmark differs in benchmark; expected: benchmark HumanEval; "
        "got: benchmark HumanEvalPlus; fix: measure both alike"
    ]
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    interval = {"teacher": "12/164 (4.2%–12.3%)", "student": "0/164 (0.0%–2.3%)"}
    assert f"| HumanEvalPlus solved (greedy pass@1) ↑ | {interval['teacher']} | {interval['student']} | – |" in lines
    assert f"| HumanEval solved (greedy pass@1) ↑ | – | – | {interval['student']} |" in lines
    assert "HumanEvalPlus's first 3 prompts, not chosen, and what the models write after them." in lines


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pass_at_1": None, "ci95": None, "pass_at_k": None, "reasons": {"pass_at_1": "not run: no isolation"}},
         "The teacher has no score on HumanEval: not run: no isolation."),
        ({"settings": {"decoding": "greedy", "sandbox": {"unsafe_no_sandbox": True, "host_reads_allowed": True}}},
         "The teacher's programs for HumanEval were run without a sandbox."),
        ({"settings": {"decoding": "greedy", "sandbox": {"unsafe_no_sandbox": False, "host_reads_allowed": True}}},
         "The teacher's programs for HumanEval were run where they could read the machine's files."),
    ],
)  # fmt: skip
def test_programs_that_were_not_run_or_run_unsafely_are_said_so(full, tmp_path, changes, sentence):
    write_humaneval(tmp_path, "teacher", **changes)
    report = build_report(tmp_path / "eval", {}, [], tmp_path / "report")
    assert sentence in report["caveats"] and sentence not in full[1]["caveats"]
    for page in ("report.md", "report.html"):
        assert html.unescape((tmp_path / "report" / page).read_text()).count(sentence) == 1


@pytest.mark.usefixtures("undrawn")
def test_results_of_two_models_in_one_row_are_said(tmp_path):
    """A student that was trained again after it was measured; its own results agree."""
    arguments = write_everything(tmp_path)
    save_model(arguments["runs"]["student_kd"])
    now = model_digest(arguments["runs"]["student_kd"])
    for name, inputs in (("fidelity", {"model": "old"}), ("draft", {"teacher": "t", "student": now})):
        file = tmp_path / "eval" / "student_kd" / f"{name}.json"
        write(file, json.loads(file.read_text()) | {"inputs": inputs})
    report = build_report(**arguments)
    assert report["models"]["student_kd"]["digests"] == {"run": now, "fidelity": "old", "draft": now}
    assert [sentence for sentence in report["caveats"] if "digest" in sentence] == [
        "The distilled student's figures are not all of the same model: run, fidelity, draft name different digests of "
        "it. Measure it again."
    ]
    save_model(arguments["runs"]["student_kd"], seed=1)
    assert not collect(
        arguments["eval_dir"], arguments["runs"], arguments["caches"], arguments["proof_file"], arguments["out_dir"]
    ).is_up_to_date(arguments["out_dir"])


@pytest.mark.usefixtures("undrawn")
def test_figures_of_training_text_are_not_called_held_out(tmp_path):
    arguments = write_everything(tmp_path)
    file = tmp_path / "eval" / "student_kd" / "fidelity.json"
    write(file, json.loads(file.read_text()) | {"seen_in_training": True})
    student = build_report(**arguments)["models"]["student_kd"]
    assert student["heldout_nll_nats"] is None
    assert "scored on documents that it was trained on" in student["reasons"]["heldout_nll_nats"]
    assert student["decode_tokens_per_second"] == 214.6


def test_a_student_named_otherwise_than_its_results_is_refused(tmp_path):
    arguments = write_everything(tmp_path)
    arguments["runs"]["student_dk"] = arguments["runs"].pop("student_kd")
    with pytest.raises(ConfigError, match="expected: student_kd; got: student_dk"):
        build_report(**arguments)


def test_different_held_out_caches_are_said(tmp_path):
    write_fidelity(tmp_path, "student_kd")
    path = write_fidelity(tmp_path, "student_ce")
    write(path, {**json.loads(path.read_text()), "cache": CACHE | {"digest": "00"}})
    caveats = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["caveats"]
    assert any("different held-out caches" in sentence for sentence in caveats)


NAMES = ["<b>&x", "<script>alert(1)</script>", "a|b `c`", "$x^2$", "Distilled student", "]]><svg onload=x>", "--><i>"]


def test_names_are_escaped(tmp_path):
    arguments = write_everything(tmp_path)
    original = json.loads((tmp_path / "eval" / "student_kd" / "fidelity.json").read_text())
    for name in NAMES:
        changes = {"model": original["model"] | {"path": name, "parameters": 1}, "kl_kind": name}
        write(tmp_path / "eval" / name.replace("/", "∕") / "fidelity.json", original | changes)
    report = build_report(**arguments)
    labels = [model["label"] for model in report["models"].values()]
    assert len(labels) == len(set(labels)) == 3 + len(NAMES)
    page = Page((tmp_path / "report" / "report.html").read_text())
    assert not {"b", "i", "script"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if any(key.startswith("on") for key in attributes)]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in side_by_side(tmp_path)}) == 1


def side_by_side(root):
    """The lines of the Markdown page's first table."""
    lines = (root / "report" / "report.md").read_text().split("## Side by side")[1].splitlines()
    return list(itertools.takewhile(lambda line: line.startswith("|"), lines[2:]))


@pytest.mark.parametrize(
    ("key", "value"),
    [("nll_nats", "1.5"), ("nll_nats", True), ("num_targets", 1.5), ("cache", [3]), ("reasons", [3]), ("machine", 3),
     ("per_document", [3]), ("ece_bins", [3]), ("ci95", {"nll_nats": 3}), ("ci95", {"nll_nats": ["a", "b"]})],
)  # fmt: skip
def test_a_result_of_another_form_is_refused_by_file_and_key(tmp_path, key, value):
    file = write_fidelity(tmp_path, "student_kd")
    write(file, json.loads(file.read_text()) | {key: value})
    with pytest.raises(ConfigError, match=f"fidelity.json, {key}"):
        build_report(tmp_path / "eval", {}, [], tmp_path / "report")


def test_a_result_that_lacks_a_key_is_refused_and_others_are_passed_over(tmp_path):
    value = json.loads(write_fidelity(tmp_path, "student_kd").read_text())
    result = Fidelity.from_dict(value | {"from_a_later_version": 1}, "here")
    assert result.to_dict() == value
    del value["kl_kind"]
    with pytest.raises(ConfigError, match="here; expected: kl_kind"):
        Fidelity.from_dict(value, "here")


@pytest.mark.parametrize("content", ["{", "[]", '{"nll_nats": NaN}', '{"nll_nats": 1e999}'])
def test_a_broken_result_is_refused_by_name(tmp_path, content):
    path = write_fidelity(tmp_path, "student_kd")
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        build_report(tmp_path / "eval", {}, [], tmp_path / "report")


def test_a_log_line_cut_by_a_kill_is_left_out_and_a_broken_one_refused(tmp_path):
    run = write_run(tmp_path, "student_kd")
    log = run / "training_log.jsonl"
    log.write_text(log.read_text() + '{"step": 310, "ce"')
    build_report(tmp_path / "eval", {"student_kd": run}, [], tmp_path / "report")
    log.write_text('{"step": 310, "ce"\n{"step": 320, "ce": 1.0}\n')
    with pytest.raises(ConfigError, match="line 1"):
        build_report(tmp_path / "eval", {"student_kd": run}, [], tmp_path / "report")


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.0385, "26× smaller"), (12.4, "12× larger"), (0.5, "2× smaller"), (1.34, "1.3× larger"), (1.001, "no larger")],
)
def test_ratio_text(ratio, text):
    assert ratio_text(ratio, "smaller", "larger") == text


@pytest.mark.parametrize(
    ("value", "text"), [(134_515_008, "134.5 M"), (3_030_371_328, "3.0 B"), (999, "999"), (1000, "1.0 k")]
)
def test_count(value, text):
    assert count(value) == text
