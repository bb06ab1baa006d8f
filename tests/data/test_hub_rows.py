"""Rows of the Hub through the real client library: all of them from the disk, the first of them from a stream."""

import json
import subprocess
import sys

import pytest

from tests.support.loopback_hub import Repository

READ = """
import json, sys
from data.load import Source, open_documents
from shared.errors import ConfigError
found = open_documents(Source(sys.argv[1], "train", limit_docs=json.loads(sys.argv[2])))
texts = [(document.id, document.completion) for document in found.documents]
print(json.dumps([texts, found.revision, found.config, found.num_documents, found.license]))
"""


@pytest.fixture(scope="module", params=["jsonl", "parquet"])
def repository(hub, request):
    """A data set of three files, with a column that Python cannot hold in Parquet."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {"README.md": b"---\nlicense: mit\n---\n"}
    for number in range(3):
        rows = [{"id": f"{number}-{i}", "text": f"x = {i}\n" * 400} for i in range(40)]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if request.param == "parquet":
            buffer = io.BytesIO()
            days = pa.array([10_000_000] * 40, pa.date32())
            pq.write_table(pa.Table.from_pylist(rows).append_column("day", days), buffer)
            data = buffer.getvalue()
        files[f"data/train-{number}.{request.param}"] = data
    name = f"owner/plain-{request.param}"
    hub.datasets[name] = Repository()
    hub.datasets[name].commit(files)
    return name


def read(environment, name, limit):
    command = [sys.executable, "-c", READ, name, json.dumps(limit)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_first_documents_are_read_from_the_first_file_and_nothing_is_kept(hub, repository, tmp_path):
    asked = len(hub.requests)
    home = tmp_path / "home"
    first, *facts, license = read(hub.environment(home), repository, 5)
    assert [id for id, _ in first] == [f"0-{i}" for i in range(5)]
    assert (facts[0], facts[2], license) == (hub.datasets[repository].branches["main"], 5, "mit")
    fetched = {path.rpartition("/")[2] for verb, path in hub.requests[asked:] if verb == "GET" and "/train-" in path}
    assert {name.partition(".")[0] for name in fetched} == {"train-0"}
    assert not list(home.rglob("*.arrow"))
    whole, *same, _ = read(hub.environment(home), repository, None)
    assert (whole[:5], len(whole), same) == (first, 120, [*facts[:2], 120])
    assert list(home.rglob("*.arrow"))
    offline = hub.environment(home, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert read(offline, repository, 5) == [first, *facts, license]  # of the rows that were fetched
