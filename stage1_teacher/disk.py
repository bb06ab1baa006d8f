"""Disk space: a build that cannot fit does not start, and stops at a whole shard if the space runs out."""

import shutil
from pathlib import Path

from shared.errors import require
from stage1_teacher.config import TeacherConfig

_LARGE_VOCABULARY = 32_768


def least_bytes_per_token(config: TeacherConfig, tokenizer_size: int) -> float:
    """A lower bound of the cache's bytes per token, known before anything is labelled.

    Real caches over a vocabulary of 49,152 take 6 + 1.5 K bytes per token with codec `q` and 6 + 2.4 K with `f16`, 3 %
    less over repetitive code; fewer distinct ids take less. With top-p a row may have a single entry, and few samples
    are distinct.
    """
    entries = config.top_k if config.top_p is None else 1
    if tokenizer_size >= _LARGE_VOCABULARY:
        each = 1.45 if config.codec == "q" else 2.3
    else:
        each = 1.0 if config.codec == "q" else 1.8
    return 5 + each * min(entries, tokenizer_size) + 0.3 * (config.samples or 0)


def free_bytes(out: Path) -> int:
    """Bytes that this user may still write to the disk of a folder, which need not exist yet."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_space(out: Path, num_tokens: int, bytes_per_token: float, *, present_bytes: int = 0) -> None:
    """Refuse to label tokens that the disk cannot hold.

    Args:
        out: the cache's folder.
        num_tokens: tokens still to be labelled.
        bytes_per_token: of each.
        present_bytes: of these tokens, what is written already.

    Raises:
        ConfigError: with the figures.
    """
    need, free = round(num_tokens * bytes_per_token) - present_bytes, free_bytes(out)
    require(
        need <= free,
        "the disk cannot hold the cache",
        where=out,
        expected=f"{need:,} bytes free ({num_tokens:,} tokens at {bytes_per_token:.0f} bytes or more)",
        got=f"{free:,} bytes free",
        fix="free space and run the same command again, which keeps finished shards; or choose a smaller --top-k, a "
        "--top-p, or an --out on another disk",
    )
