"""Who made the labels: one digest for teacher, tokenizer and label options, and comparisons that name both sides."""

from collections.abc import Mapping
from typing import Any

from shared.cache.format import IDENTITY_PARTS
from shared.errors import CacheFormatError, CacheMismatchError
from shared.files import sha256_json

IDENTIFYING = {"teacher": ("weights_digest", "config_digest"), "tokenizer": ("digest",)}


def label_identity(identity: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over what decides a label: teacher weights and config, tokenizer, all label options.

    Args:
        identity: `teacher` with `weights_digest` and `config_digest`, `tokenizer` with `digest`, and `labels`, of which
            every key counts. Names, revisions and licenses beside the digests describe and do not count.

    Raises:
        CacheFormatError: one of these is missing.
    """
    return sha256_json(_counted(identity))


def require_same_labels(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, ours_name: object, theirs_name: object
) -> None:
    """Refuse two identities whose labels are not of one kind.

    Raises:
        CacheMismatchError: names both sides and every part that differs, with both values.
    """
    sides = [_counted(identity) for identity in (ours, theirs)]
    keys = sorted({(part, key) for side in sides for part in side for key in side[part]})
    values = {f"{part}.{key}": [side[part].get(key, "none") for side in sides] for part, key in keys}
    differing = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    if differing:
        raise CacheMismatchError(
            f"the labels of {ours_name} and {theirs_name} differ in {', '.join(differing)}",
            expected=", ".join(f"{key} {pair[0]}" for key, pair in differing.items()),
            got=", ".join(f"{key} {pair[1]}" for key, pair in differing.items()),
            fix="only labels of one teacher, one tokenizer and equal label options belong in one cache",
        )


def _counted(identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The part of an identity that its digest is taken of."""
    counted: dict[str, Any] = {}
    for part in IDENTITY_PARTS:
        if not isinstance(identity.get(part), Mapping):
            raise CacheFormatError("the identity lacks a part", expected=part, got=", ".join(identity) or "nothing")
        keys = IDENTIFYING.get(part, tuple(identity[part]))
        missing = [key for key in keys if key not in identity[part]]
        if missing:
            raise CacheFormatError("the identity lacks a digest", expected=f"{part}.{missing[0]}", got="none")
        counted[part] = {key: identity[part][key] for key in keys}
    return counted


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
