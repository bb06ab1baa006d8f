"""`codedistill trace`: a real small run from documents and teacher to export and report, whole and broken."""

import contextlib
import dataclasses
import json
import shutil

import pytest
from click.testing import CliRunner

from data.load import load_documents
from shared.cache.identity import label_identity
from shared.cache.manifest import read_manifest, write_manifest
from shared.cache.transform import slice_cache
from shared.cli import codedistill
from shared.errors import ConfigError
from shared.eval.report.lineage import broken_links, trace_lineage
from shared.files import sha256_file, sha256_json
from stage2_student.export import export
from tests.support.report_fixture import build_report, write
from tests.support.student_cache import make_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """data.jsonl, teacher/, cache/, runs/kd, exported/ and a report/ of it all."""
    root = tmp_path_factory.mktemp("made")
    (root / "data.jsonl").write_text("".join(json.dumps({"text": f"x = {i}\n"}) + "\n" for i in range(8)))
    (root / "teacher").mkdir()
    (root / "teacher" / "config.json").write_text("{}")
    (root / "teacher" / "model.safetensors").write_bytes(b"weights")
    manifest = read_manifest(make_cache(root / "cache").path)
    manifest.identity["teacher"] |= {
        "name": "teacher", "config_digest": sha256_file(root / "teacher" / "config.json"),
        "weights_digest": sha256_json({"model.safetensors": sha256_file(root / "teacher" / "model.safetensors")}),
    }  # fmt: skip
    manifest.sources[0] |= {"name": "data.jsonl", "digest": load_documents(str(root / "data.jsonl"), "train").digest}
    write_manifest(root / "cache", dataclasses.replace(manifest, label_identity=label_identity(manifest.identity)))
    options = {"preset": "tiny", "block_size": 48, "max_steps": 1, "save_steps": 0, "bf16": False}
    assigned = [f"--set={key}={json.dumps(value)}" for key, value in options.items()]
    command = ["student", "train", "--cache", "cache", "--out", "runs/kd", *assigned]
    with contextlib.chdir(root):  # run.json records the cache's path as it was given
        done = CliRunner(env={"WANDB_MODE": "disabled"}).invoke(codedistill, command)
    assert done.exit_code == 0, (done.output, done.exception)
    export(root / "runs" / "kd", root / "exported")
    build_report(root / "eval", {"kd": root / "runs" / "kd"}, [root / "cache"], root / "report")
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def states(node, path=""):
    """Each piece's state by its kind and those of what it was found through."""
    here = f"{path}/{node['kind']}"
    found = {here: node["state"]}
    for part in node["made_from"]:
        found |= states(part, here)
    return found


def trace(path):
    """Trace with all parts at hand."""
    root = path.parents[1] if path.parent.name == "runs" else path.parent
    return trace_lineage(path, [root, root / "runs"])


def damage(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_an_export_leads_to_run_cache_teacher_and_documents(root):
    chain = trace(root / "exported")
    assert states(chain) == dict.fromkeys(
        ("/export", "/export/run", "/export/run/cache", "/export/run/cache/teacher", "/export/run/cache/documents"),
        "whole",
    )
    assert broken_links(chain) == []
    (run,) = chain["made_from"]
    assert run["digest"] == chain["digest"] == sha256_file(root / "runs" / "kd" / "model.safetensors")
    (cache,) = run["made_from"]
    assert [part["at"] for part in cache["made_from"]] == [str(root / "teacher"), str(root / "data.jsonl")]


def test_on_the_students_machine_teacher_and_documents_are_known_by_digest_alone(root):
    for name in ("teacher", "data.jsonl"):
        (root / name).rename(root.parent / name)
    chain = trace(root / "runs" / "kd")
    assert states(chain)["/run/cache/teacher"] == states(chain)["/run/cache/documents"] == "not at hand"
    assert broken_links(chain) == []


def test_what_is_not_named_is_not_at_hand_and_breaks_nothing(root):
    chain = trace_lineage(root / "exported")
    assert states(chain)["/export"] == "whole"
    found = states(chain)
    assert (found.pop("/export"), set(found.values())) == ("whole", {"not at hand"})
    assert broken_links(chain) == []


def test_a_run_records_where_its_caches_were(root, monkeypatch):
    assert states(trace_lineage(root / "runs" / "kd"))["/run/cache"] == "not at hand"
    monkeypatch.chdir(root)
    assert states(trace_lineage(root / "runs" / "kd"))["/run/cache"] == "whole"


def test_a_part_that_was_moved_and_renamed_is_found_where_the_user_says(root):
    (root / "cache").rename(root / "elsewhere")
    (root / "runs" / "kd").rename(root / "old")
    assert set(states(trace(root / "exported")).values()) == {"whole"}


BROKEN = {  # what happens → which piece tells, and how
    "shard": (lambda r: damage(r / "cache" / "shard-00000.h5"), "/export/run/cache", "altered"),
    "tokenizer": (lambda r: damage(r / "cache" / "tokenizer" / "tokenizer.json"), "/export/run/cache", "altered"),
    "manifest": (lambda r: damage(r / "cache" / "manifest.json"), "/export/run/cache", "altered"),
    "no shard": (lambda r: (r / "cache" / "shard-00000.h5").unlink(), "/export/run/cache", "altered"),
    "run's weights": (lambda r: damage(r / "runs/kd/model.safetensors"), "/export/run", "altered"),
    "no weights": (lambda r: (r / "runs/kd/model.safetensors").unlink(), "/export/run", "missing"),
    "unfinished": (lambda r: (r / "exported/lineage.json").write_text(unfinished(r)), "/export/run", "not recorded"),
    "export's weights": (lambda r: damage(r / "exported/model.safetensors"), "/export", "altered"),
    "export's config": (lambda r: edit(r / "exported/config.json", hidden_size=1), "/export", "altered"),
    "teacher": (lambda r: damage(r / "teacher/model.safetensors"), "/export/run/cache/teacher", "altered"),
    "documents": (lambda r: (r / "data.jsonl").write_text('{"text": "y"}\n'), "/export/run/cache/documents", "altered"),
}


def edit(file, **changes):
    write(file, json.loads(file.read_text()) | changes)


def unfinished(root):
    """The lineage of an export of a run that training has gone on with."""
    edit(root / "runs" / "kd" / "run.json", state="running", weights_sha256=None)
    lineage = json.loads((root / "exported" / "lineage.json").read_text())
    lineage["run"]["sha256"] = sha256_file(root / "runs" / "kd" / "run.json")
    return json.dumps(lineage)


def test_another_run_or_cache_in_the_same_place_is_not_the_recorded_one(root):
    edit(root / "runs" / "kd" / "run.json", parameters=1)
    assert states(trace(root / "exported"))["/export/run"] == "not at hand"
    shutil.rmtree(root / "cache")
    make_cache(root / "cache", seed=1)
    assert states(trace(root / "runs" / "kd"))["/run/cache"] == "not at hand"


@pytest.mark.parametrize("what", BROKEN)
def test_where_the_chain_breaks_is_said(root, what):
    happen, piece, state = BROKEN[what]
    happen(root)
    chain = trace(root / "exported")
    found = states(chain)
    assert found.pop(piece) == state
    assert set(found.values()) <= {"whole", "not at hand"}  # and the rest of the chain is still walked
    assert "/export/run/cache/teacher" in found | {piece: state} or what == "manifest"
    assert len(broken_links(chain)) == 1


def test_a_run_without_a_digest_of_its_weights_proves_nothing(root):
    edit(root / "runs" / "kd" / "run.json", weights_sha256=None)
    assert states(trace(root / "runs" / "kd"))["/run"] == "not recorded"


def test_a_run_that_started_from_another_leads_to_it(root):
    weights = sha256_file(root / "runs" / "kd" / "model.safetensors")
    shutil.copytree(root / "runs" / "kd", root / "next")
    edit(root / "next" / "run.json", init_from={"path": "runs/kd", "weights_sha256": weights})
    found = states(trace_lineage(root / "next", [root / "runs", root / "cache", root / "next"]))
    assert found["/run/starting weights/run/cache"] == "whole"
    edit(root / "next" / "run.json", init_from={"path": "runs/kd", "weights_sha256": "00"})
    assert states(trace(root / "next"))["/run/starting weights"] == "not at hand"
    edit(root / "next" / "run.json", init_from=None, init_embedding={"path": "runs/kd", "weights_sha256": weights})
    assert states(trace_lineage(root / "next", [root / "runs", root / "cache"]))["/run/starting embedding"] == "whole"


def test_a_cut_cache_leads_to_the_one_it_was_cut_from(root):
    slice_cache(root / "cache", root / "cut", documents=5)
    found = states(trace(root / "cut"))
    assert found["/cache"] == found["/cache/derived from cache"] == "whole"
    assert found["/cache/derived from cache/teacher"] == "whole"
    shutil.rmtree(root / "cache")
    assert states(trace(root / "cut"))["/cache/derived from cache"] == "not at hand"


def test_a_report_leads_to_its_files_runs_and_caches(root):
    found = trace(root / "report")
    assert broken_links(found) == []
    assert {part["name"] for part in found["made_from"]} == {
        "cache/manifest.json", "runs/kd/run.json", "runs/kd/training_log.jsonl",
    }  # fmt: skip
    assert states(found)["/report/file/run/cache/teacher"] == "whole"
    (root / "runs" / "kd" / "training_log.jsonl").write_text("{}\n")
    (root / "runs" / "kd" / "run.json").unlink()
    told = broken_links(trace(root / "report" / "report.json"))
    assert [line.split(": ")[:2] for line in told] == [
        ["file runs/kd/run.json", "missing"], ["file runs/kd/training_log.jsonl", "altered"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"caches": None},
        {"caches": [{}]},
        {"caches": [{"shards": 3, "sources": None}]},
        {"init_from": "runs"},
        {"validation": 3},
    ],
)
def test_a_record_of_another_form_is_refused_by_name(root, changes):
    edit(root / "runs" / "kd" / "run.json", **changes)
    with pytest.raises(ConfigError, match="a record of another form"):
        trace(root / "runs" / "kd")


@pytest.mark.parametrize("name", ["absent", "data.jsonl", "runs"])
def test_what_cannot_be_traced_is_refused(root, name):
    with pytest.raises(ConfigError, match=name):
        trace(root / name)


def test_the_command_prints_a_tree_and_exits_with_1_where_it_breaks(root, monkeypatch):
    monkeypatch.chdir(root)
    done = CliRunner().invoke(codedistill, ["trace", "exported", "--look-in", ".", "--look-in", "runs"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("export exported: whole at exported  ")
    assert lines[1].startswith("└─ run kd: whole at runs/kd  ")
    assert lines[2].startswith("   └─ cache cache: whole at cache  ")
    assert lines[3].startswith("      ├─ teacher teacher: whole at teacher  ")
    assert lines[-1] == "nothing is broken in what is at hand"
    damage(root / "cache" / "shard-00001.h5")
    done = CliRunner().invoke(codedistill, ["trace", "exported", "--look-in", ".", "--look-in", "runs", "--json"])
    assert done.exit_code == 1
    (broken,) = json.loads(done.stdout)["broken"]
    assert broken.startswith("cache cache: altered: shard-00001.h5: SHA-256 ")
