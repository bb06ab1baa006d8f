import hashlib
import html.parser
import json
import re

import pytest
from report_fixture import (
    MACHINE,
    write,
    write_cache,
    write_everything,
    write_fidelity,
    write_humaneval,
    write_latency,
    write_run,
)

from shared.errors import ConfigError
from shared.eval.findings import compare, count
from shared.eval.report import build_report

KEYS = ("parameters", "bytes", "heldout_nll_nats", "heldout_bits_per_byte", "kl_to_teacher_nats", "top1_agreement",
        "prefill_ms", "decode_tokens_per_second")  # fmt: skip


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("full")
    arguments = write_everything(root)
    return root, build_report(**arguments)


def test_every_figure_arrives_in_report_json(full):
    root, report = full
    assert strict((root / "report" / "report.json").read_text()) == report
    assert list(report["models"]) == ["teacher", "student_kd", "student_ce"]
    student = report["models"]["student_kd"]
    assert [student[key] for key in KEYS] == [5_181_312, 20_733_040, 4.631, 1.873, 2.482, 0.331, 9.8, 214.6]
    assert student["humaneval"] == {"pass_at_1": 0.0, "num_problems": 164, "ci95": [0.0, 0.0229]}
    assert student["settings"]["run"]["config"]["alpha"] == 0.7
    assert student["machines"]["latency"] == MACHINE
    assert all(model["reasons"] == {} for model in report["models"].values())
    assert report["models"]["teacher"]["ratios_to_teacher"] == dict.fromkeys(
        ("parameters", "bytes", "prefill_ms", "decode_tokens_per_second"), 1.0
    )
    assert student["ratios_to_teacher"]["decode_tokens_per_second"] == 214.6 / 17.3


def test_every_file_is_named_with_its_digest(full):
    root, report = full
    assert len(report["files"]) == 13
    for name, file in report["files"].items():
        assert file["sha256"] == hashlib.sha256((root / name).read_bytes()).hexdigest()


def test_the_headline_is_made_of_the_figures(full):
    assert full[1]["headline"] == [
        "The distilled student is 26× smaller than its teacher and decodes 12× faster.",
        "Its KL to the teacher is 2.482 nats per token, its cross-entropy twin's 3.104.",
        "Its held-out NLL is 4.631 nats per token, its teacher's 1.412, its cross-entropy twin's 4.587.",
        "HumanEval problems solved, greedy: teacher 12/164, distilled student 0/164, cross-entropy twin 0/164.",
    ]


def test_the_caveats_say_what_is_unfavourable(full):
    text = " ".join(full[1]["caveats"])
    assert "One seed proves nothing" in text
    assert "4.631 nats per token, worse than its twin's 4.587" in text
    assert "distilled student 0/164 (95% interval 0.0% to 2.3%)" in text
    assert "A score of 0 cannot rank two students" in text
    assert "partition K=64" in text
    assert "taken on (Example CPU @ 2.40GHz, 2 cores, no accelerator)" in text
    assert "The teacher is small (134.5 M parameters)" in text


def test_markdown_table(full):
    lines = (full[0] / "report" / "report.md").read_text().splitlines()
    assert "| | Teacher | Distilled student | Cross-entropy twin |" in lines
    assert "| Parameters | 134.5 M | 5.2 M (26× smaller) | 5.2 M (26× smaller) |" in lines
    assert "| Held-out NLL, nats per token ↓ | 1.412 | 4.631 (+3.219) | 4.587 (+3.175) |" in lines


class Page(html.parser.HTMLParser):
    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

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
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert not re.search(r"https?://|url\((?!#)|@import", text.replace("http://www.w3.org/", ""))
    assert not [a for _, a in page.tags if not a.get("href", "#").startswith("#") or "src" in a]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', text)
    assert references and set(references) <= set(ids)
    assert names.count("table") == names.count("caption") == 2
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    labels = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(labels) == names.count("svg") == 5
    assert "Distilled student KL to the teacher, nats per token: 2.482" in labels[0]
    assert not re.search(r"#[0-9a-f]{6}\b", text[text.index("<svg") :].split("</svg>")[0]), (
        "a colour the page cannot theme"
    )


def test_a_second_report_has_the_same_bytes(full, tmp_path):
    root, _ = full
    before = {path.name: path.read_bytes() for path in (root / "report").iterdir()}
    build_report(**write_everything(root))
    assert {path.name: path.read_bytes() for path in (root / "report").iterdir()} == before


def test_nothing_measured(tmp_path):
    report = build_report(tmp_path / "eval", {}, [], tmp_path / "report")
    assert report["headline"] == ["No student has been measured yet."]
    teacher = report["models"]["teacher"]
    assert all(teacher[key] is None for key in KEYS)
    assert teacher["reasons"]["heldout_nll_nats"] == "not measured: there is no fidelity.json for this model"
    assert set(teacher["reasons"]) == {*KEYS, "humaneval.pass_at_1", "humaneval.num_problems", "humaneval.ci95"}
    assert "<svg" not in (tmp_path / "report" / "report.html").read_text()


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
    assert len(report["files"]) == (2 if subset == "run" else 1)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.json", "report.md", "report.html"}


def test_the_teachers_nll_comes_from_the_cache_where_it_was_not_scored(tmp_path):
    write_fidelity(tmp_path, "student_kd")
    teacher = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["models"]["teacher"]
    assert teacher["heldout_nll_nats"] == 1.411
    assert "heldout_nll_nats" not in teacher["reasons"] and "kl_to_teacher_nats" in teacher["reasons"]


def test_times_of_two_machines_have_no_ratio(tmp_path):
    for name, host in (("teacher", "big"), ("student_kd", "small")):
        write(tmp_path / "eval" / name / "latency.json", {
            "parameters": 100, "bytes": 200, "prefill_ms": {"median": 5.0, "spread": 0.1},
            "decode_tokens_per_second": 50.0, "machine": {**MACHINE, "host": host},
        })  # fmt: skip
    student = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["models"]["student_kd"]
    assert student["prefill_ms"] == 5.0
    assert student["ratios_to_teacher"] == {
        "parameters": 1.0, "bytes": 1.0, "prefill_ms": None, "decode_tokens_per_second": None,
    }  # fmt: skip


def test_a_results_own_reason_is_kept(tmp_path):
    write(tmp_path / "eval" / "teacher" / "fidelity.json", {"nll_nats": None, "reasons": {"nll_nats": "no targets"}})
    teacher = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["models"]["teacher"]
    assert teacher["reasons"]["heldout_nll_nats"] == "no targets"
    assert teacher["reasons"]["top1_agreement"] == "fidelity.json has no top1_agreement"


def test_an_incomplete_humaneval_has_no_score(tmp_path):
    write(tmp_path / "eval" / "teacher" / "humaneval" / "result.json", {
        "pass_at_1": None, "ci95": [None, None], "num_problems": 164,
        "reasons": {"pass_at_1": "3 programs could not be run"},
    })  # fmt: skip
    teacher = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["models"]["teacher"]
    assert teacher["reasons"]["humaneval.pass_at_1"] == "3 programs could not be run"
    assert "| HumanEval solved (greedy pass@1) ↑ | – |" in (tmp_path / "report" / "report.md").read_text()


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
    write(path, {**json.loads(path.read_text()), "cache": {"manifest_sha256": "0" * 64}})
    caveats = build_report(tmp_path / "eval", {}, [], tmp_path / "report")["caveats"]
    assert any("different held-out caches" in sentence for sentence in caveats)


def test_names_are_escaped(tmp_path):
    write_fidelity(tmp_path, "student_kd").parent.rename(tmp_path / "eval" / "<b>&x")
    build_report(tmp_path / "eval", {}, [], tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    assert "<b>" not in text and "&lt;b&gt;&amp;x" in text
    Page(text)


@pytest.mark.parametrize("content", ["{", "[]", '{"nll_nats": NaN}'])
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
def test_compare(ratio, text):
    assert compare(ratio, "smaller", "larger") == text


@pytest.mark.parametrize(
    ("value", "text"), [(134_515_008, "134.5 M"), (3_030_371_328, "3.0 B"), (999, "999"), (1000, "1.0 k")]
)
def test_count(value, text):
    assert count(value) == text
