"""`codedistill trace`: a real small run from documents and teacher to export and report, whole and broken."""

import json
import shutil

import pytest
from click.testing import CliRunner

from data.load import load_documents
from shared.cache.identity import label_identity
from shared.cache.manifest import read_manifest, write_manifest
from shared.cache.slice import slice_cache
from shared.cli import codedistill
from shared.errors import ConfigError
from shared.eval.report.lineage import breaks, trace
from shared.eval.report.report import build_report
from shared.files import sha256_file, sha256_json
from stage2_student.export import export
from tests.support.report_fixture import write
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
    manifest["identity"]["teacher"] |= {
        "name": "teacher", "config_digest": sha256_file(root / "teacher" / "config.json"),
        "weights_digest": sha256_json({"model.safetensors": sha256_file(root / "teacher" / "model.safetensors")}),
    }  # fmt: skip
    manifest["sources"][0] |= {"name": "data.jsonl", "digest": load_documents(str(root / "data.jsonl"), "train").digest}
    write_manifest(root / "cache", manifest | {"label_identity": label_identity(manifest["identity"])})
    options = {"preset": "tiny", "block_size": 48, "max_steps": 1, "save_steps": 0, "bf16": False}
    assigned = [f"--set={key}={json.dumps(value)}" for key, value in options.items()]
    command = ["student", "train", "--cache", str(root / "cache"), "--out", str(root / "runs" / "kd"), *assigned]
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


def damage(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_an_export_leads_to_run_cache_teacher_and_documents(root):
    chain = trace(root / "exported", [root])
    assert states(chain) == dict.fromkeys(
        ("/export", "/export/run", "/export/run/cache", "/export/run/cache/teacher", "/export/run/cache/documents"),
        "whole",
    )
    assert breaks(chain) == []
    (run,) = chain["made_from"]
    assert run["digest"] == chain["digest"] == sha256_file(root / "runs" / "kd" / "model.safetensors")
    (cache,) = run["made_from"]
    assert [part["at"] for part in cache["made_from"]] == [str(root / "teacher"), str(root / "data.jsonl")]


def test_on_the_students_machine_teacher_and_documents_are_known_by_digest_alone(root):
    for name in ("teacher", "data.jsonl"):
        (root / name).rename(root.parent / name)
    chain = trace(root / "runs" / "kd", [root])
    assert states(chain)["/run/cache/teacher"] == states(chain)["/run/cache/documents"] == "not at hand"
    assert breaks(chain) == []


def test_a_piece_that_was_moved_and_renamed_is_found(root):
    (root / "cache").rename(root / "elsewhere")
    (root / "runs" / "kd").rename(root / "old")
    assert set(states(trace(root / "exported", [root])).values()) == {"whole"}


BROKEN = {  # what happens → which piece tells, and how
    "shard": (lambda r: damage(r / "cache" / "shard-00000.h5"), "/export/run/cache", "altered"),
    "tokenizer": (lambda r: damage(r / "cache" / "tokenizer" / "tokenizer.json"), "/export/run/cache", "altered"),
    "manifest": (lambda r: damage(r / "cache" / "manifest.json"), "/export/run/cache", "missing"),
    "no cache": (lambda r: shutil.rmtree(r / "cache"), "/export/run/cache", "missing"),
    "another cache": (lambda r: another_cache(r), "/export/run/cache", "altered"),
    "run's weights": (lambda r: damage(r / "runs/kd/model.safetensors"), "/export/run", "altered"),
    "no weights": (lambda r: (r / "runs/kd/model.safetensors").unlink(), "/export/run", "missing"),
    "run.json": (lambda r: edit(r / "runs/kd/run.json", parameters=1), "/export/run", "missing"),
    "export's weights": (lambda r: damage(r / "exported/model.safetensors"), "/export", "altered"),
    "export's config": (lambda r: edit(r / "exported/config.json", hidden_size=1), "/export", "altered"),
    "teacher": (lambda r: damage(r / "teacher/model.safetensors"), "/export/run/cache/teacher", "altered"),
    "documents": (lambda r: (r / "data.jsonl").write_text('{"text": "y"}\n'), "/export/run/cache/documents", "altered"),
}


def edit(file, **changes):
    write(file, json.loads(file.read_text()) | changes)


def another_cache(root):
    """A cache of the same documents and labels, with other shards."""
    kept = read_manifest(root / "cache")
    shutil.rmtree(root / "cache")
    manifest = read_manifest(make_cache(root / "cache", seed=1).path)
    write_manifest(root / "cache", manifest | {key: kept[key] for key in ("identity", "label_identity", "sources")})


@pytest.mark.parametrize("what", BROKEN)
def test_where_the_chain_breaks_is_said(root, what):
    happen, piece, state = BROKEN[what]
    happen(root)
    chain = trace(root / "exported", [root])
    found = states(chain)
    assert found.pop(piece) == state
    assert set(found.values()) <= {"whole", "not at hand"}  # and the rest of the chain is still walked
    assert "/export/run/cache/teacher" in found | {piece: state}
    assert len(breaks(chain)) == 1


def test_a_whole_copy_counts_where_another_is_altered(root):
    shutil.copytree(root / "cache", root / "a-copy")
    damage(root / "a-copy" / "shard-00000.h5")
    assert states(trace(root / "runs" / "kd", [root]))["/run/cache"] == "whole"


def test_an_export_without_lineage_is_known_by_its_weights(root):
    (root / "exported" / "lineage.json").unlink()
    assert states(trace(root / "exported", [root]))["/export/run/cache"] == "whole"
    damage(root / "exported" / "model.safetensors")
    assert breaks(trace(root / "exported", [root])) == ["run unknown: missing: no run of these weights is at hand"]


def test_a_run_without_a_digest_of_its_weights_proves_nothing(root):
    edit(root / "runs" / "kd" / "run.json", weights_sha256=None)
    assert states(trace(root / "runs" / "kd", [root]))["/run"] == "unrecorded"


def test_a_run_that_started_from_another_leads_to_it(root):
    weights = sha256_file(root / "runs" / "kd" / "model.safetensors")
    shutil.copytree(root / "runs" / "kd", root / "next")
    edit(root / "next" / "run.json", init_from={"path": "runs/kd", "weights_sha256": weights})
    found = states(trace(root / "next", [root / "runs", root / "cache"]))
    assert found["/run/starting weights/run/cache"] == "whole"
    edit(root / "next" / "run.json", init_from={"path": "runs/kd", "weights_sha256": "00"})
    assert states(trace(root / "next", [root]))["/run/starting weights"] == "not at hand"


def test_a_cut_cache_leads_to_the_one_it_was_cut_from(root):
    slice_cache(root / "cache", root / "cut", documents=5)
    found = states(trace(root / "cut", [root]))
    assert found["/cache"] == found["/cache/derived from cache"] == "whole"
    assert found["/cache/derived from cache/teacher"] == "whole"
    shutil.rmtree(root / "cache")
    assert states(trace(root / "cut", [root]))["/cache/derived from cache"] == "not at hand"


def test_a_report_leads_to_its_files_runs_and_caches(root):
    found = trace(root / "report", [root])
    assert breaks(found) == []
    assert {part["name"] for part in found["made_from"]} == {
        "cache/manifest.json", "runs/kd/run.json", "runs/kd/training_log.jsonl",
    }  # fmt: skip
    assert states(found)["/report/file/run/cache/teacher"] == "whole"
    (root / "runs" / "kd" / "training_log.jsonl").write_text("{}\n")
    (root / "runs" / "kd" / "run.json").unlink()
    told = breaks(trace(root / "report" / "report.json", [root]))
    assert [line.split(": ")[:2] for line in told] == [
        ["file runs/kd/run.json", "missing"], ["file runs/kd/training_log.jsonl", "altered"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"caches": None}, {"caches": [{}]}, {"caches": [{"shards": 3, "sources": None, "teacher": "x"}]},
        {"init_from": "runs"}, {"validation": 3}, {"weights_sha256": 3},
    ],
)  # fmt: skip
def test_a_record_of_another_shape_breaks_the_chain_and_nothing_else(root, changes):
    edit(root / "runs" / "kd" / "run.json", **changes)
    trace(root / "runs" / "kd", [root])
    assert breaks(trace(root / "exported", [root]))


@pytest.mark.parametrize("name", ["absent", "data.jsonl", "runs"])
def test_what_cannot_be_traced_is_refused(root, name):
    with pytest.raises(ConfigError, match=name):
        trace(root / name, [root])


def test_the_command_prints_a_tree_and_exits_with_1_where_it_breaks(root, monkeypatch):
    monkeypatch.chdir(root)
    done = CliRunner().invoke(codedistill, ["trace", "exported"])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("export exported: whole at exported  ")
    assert lines[1].startswith("└─ run kd: whole at runs/kd  ")
    assert lines[2].startswith("   └─ cache cache: whole at cache  ")
    assert lines[3].startswith("      ├─ teacher teacher: whole at teacher  ")
    assert lines[-1] == "the chain is whole, as far as its pieces are at hand"
    damage(root / "cache" / "shard-00001.h5")
    done = CliRunner().invoke(codedistill, ["trace", "exported", "--json"])
    assert done.exit_code == 1
    (broken,) = json.loads(done.stdout)["broken"]
    assert broken.startswith("cache cache: altered: shard-00001.h5: SHA-256 ")
