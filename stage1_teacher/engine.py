"""A teacher that only an engine can run: our head over hidden states that vLLM or another engine has written.

Shapes: n tokens of a document, D hidden size. Importing this module loads no torch.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shared.cache.format import Array
from shared.errors import ConfigError, require
from shared.files import read_json, sha256_file, write_bytes
from shared.records import from_dict
from stage1_teacher.documents import Segment

if TYPE_CHECKING:
    from torch import Tensor

RECORD, REQUESTS = "engine.json", "requests.jsonl"
EXAMPLE = {"engine": "vllm", "version": "0.23.0", "dtype": "bfloat16", "final_norm": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """`engine.json`, which stands beside the hidden states.

    With `final_norm` they are taken behind the model's final norm, as transformers' `last_hidden_state`; else before
    it, as vLLM's connector gives the last layer's.
    """

    engine: str  # who ran the teacher
    version: str
    dtype: Literal["bfloat16", "float16", "float32"]  # of the hidden states
    final_norm: bool
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 by file name; those that are named are checked

    @property
    def label(self) -> str:
        """What the label identity says of it."""
        return f"{self.engine} {self.version}, {self.dtype}, {'after' if self.final_norm else 'before'} the final norm"


class HiddenStates:
    """A folder of hidden states: safetensors with `token_ids` [n] and `hidden_states` [n, D], or [n, layers, D].

    A document's states are found by its tokens. Of several layers the last counts. The last token predicts nothing, so
    its states need not be there.

    Raises:
        ConfigError: `engine.json` is missing, or is not what `EngineRecord` says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        require(
            (folder / RECORD).is_file(),
            "a folder of hidden states does not say what made them",
            where=folder / RECORD,
            expected=f"such as {json.dumps(EXAMPLE)}",
        )
        self.record = from_dict(EngineRecord, read_json(folder / RECORD), where=str(folder / RECORD))

    @cached_property
    def _files(self) -> dict[bytes, Path]:
        """The files by their tokens: all of them, and all but the last."""
        files = {}
        for path in sorted(self.folder.rglob("*.safetensors")):
            with _opened(path, "np") as file:
                tokens = _tensor(file, path, "token_ids")
            if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
                expected, got = "integers [n]", f"{tokens.dtype} {list(tokens.shape)}"
                raise ConfigError("token ids of another form", where=f"{path}, token_ids", expected=expected, got=got)
            files[_key(tokens[:-1])] = files[_key(tokens)] = path
        return files

    def require_all(self, segments: Iterable[Segment]) -> list[Path]:
        """The files of segments; where any lacks its states, the requests that would make them are written.

        Raises:
            ConfigError: names the file of the requests.
        """
        missing: dict[bytes, dict[str, Any]] = {}
        found: dict[Path, None] = {}
        for segment in segments:
            if len(segment.ids) > 1:
                key = _key(segment.ids[:-1])
                if key in self._files:
                    found[self._files[key]] = None
                else:
                    missing[key] = {"id": segment.meta["id"], "prompt_token_ids": segment.ids[:-1].tolist()}
        if missing:
            lines = "".join(json.dumps(request) + "\n" for request in missing.values())
            write_bytes(self.folder / REQUESTS, lines.encode())
            raise ConfigError(
                "documents have no hidden states yet",
                where=self.folder,
                got=f"{len(missing):,} without, such as {next(iter(missing.values()))['id']}",
                fix=f"let the engine run over {self.folder / REQUESTS}, prompt_token_ids of each line; then run again",
            )
        return list(found)

    def states(self, tokens: Array) -> "Tensor":
        """The states [n, D] of a document's tokens but the last.

        Args:
            tokens: these tokens, i64 `[n]`.

        Raises:
            ConfigError: the file has changed, or holds states of another number, form or dtype.
        """
        path = self._files[_key(tokens)]
        name = path.relative_to(self.folder).as_posix()
        if (expected := self.record.files.get(name)) and (digest := sha256_file(path)) != expected:
            raise ConfigError("a file's bytes have changed", where=path, expected=expected, got=digest)
        with _opened(path, "pt") as file:
            given, states = _tensor(file, path, "token_ids"), _tensor(file, path, "hidden_states")
        dtype = str(states.dtype).removeprefix("torch.")
        if states.ndim not in (2, 3) or len(states) != len(given) or dtype != self.record.dtype:
            raise ConfigError(
                "hidden states of another form",
                where=f"{path}, hidden_states",
                expected=f"{self.record.dtype} [{len(given)}, hidden size], or [{len(given)}, layers, hidden size]",
                got=f"{dtype} {list(states.shape)}",
            )
        last: Tensor = states[: len(tokens)] if states.ndim == 2 else states[: len(tokens), -1]
        return last

    def delete(self, files: Iterable[Path]) -> None:
        """Remove files of hidden states, and the locks that vLLM puts beside them."""
        for path in files:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


def _key(tokens: Array) -> bytes:
    return hashlib.sha256(tokens.astype("<i8").tobytes()).digest()


def _opened(path: Path, framework: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as error:
        fix = "write it again; an engine that still runs may not have finished it"
        raise ConfigError("a file of hidden states cannot be read", where=path, got=error, fix=fix) from error


def _tensor(file: Any, path: Path, name: str) -> Any:
    """A tensor of an open file, which must hold something."""
    names = list(file.keys())
    require(name in names, "a file of hidden states lacks a tensor", where=path, expected=name, got=", ".join(names))
    tensor = file.get_slice(name)
    shape = tensor.get_shape()
    require(shape and 0 not in shape, "a tensor without values", where=f"{path}, {name}", got=shape)
    return tensor[:]
