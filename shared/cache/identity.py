"""Who made the labels: one digest for teacher, tokenizer and label options, and comparisons that name both sides."""

from collections.abc import Mapping
from typing import Any

from shared.errors import CacheFormatError, CacheMismatchError
from shared.runtime import sha256_json

IDENTIFYING = {"teacher": ("weights_digest", "config_digest"), "tokenizer": ("digest",)}


def label_identity(identity: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over what decides a label: teacher weights and config, tokenizer, all label options.

    Args:
        identity: `teacher` with `weights_digest` and `config_digest`, `tokenizer` with `digest`, and `labels`, of which
            every key counts. Names, revisions and licences beside the digests describe and do not count.

    Raises:
        CacheFormatError: one of these is missing.
    """
    counted: dict[str, Any] = {}
    for part in ("teacher", "tokenizer", "labels"):
        if not isinstance(identity.get(part), Mapping):
            raise CacheFormatError("the identity lacks a part", expected=part, got=", ".join(identity) or "nothing")
        keys = IDENTIFYING.get(part, tuple(identity[part]))
        missing = [key for key in keys if key not in identity[part]]
        if missing:
            raise CacheFormatError("the identity lacks a digest", expected=f"{part}.{missing[0]}", got="none")
        counted[part] = {key: identity[part][key] for key in keys}
    return sha256_json(counted)


def require_same(what: str, ours: Any, theirs: Any, *, ours_name: object, theirs_name: object, fix: str) -> None:
    """Refuse two things that must be equal and are not.

    Raises:
        CacheMismatchError: names both sides and both values.
    """
    if ours != theirs:
        raise CacheMismatchError(
            f"{what} of {ours_name} and {theirs_name} differ",
            expected=f"{ours} ({ours_name})",
            got=f"{theirs} ({theirs_name})",
            fix=fix,
        )
