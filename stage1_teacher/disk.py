"""Room on the disk: a build that cannot fit is refused before the teacher runs, and stops cleanly if room runs out."""

import shutil
from pathlib import Path

from shared.errors import ConfigError
from stage1_teacher.config import TeacherConfig

_LARGE_VOCABULARY = 32_768


def least_bytes_per_token(config: TeacherConfig, tokenizer_size: int) -> float:
    """What a token of the cache takes at least, known before anything is labelled.

    Real caches over a vocabulary of 49,152 take 6 + 1.5 K bytes per token with codec `q` and 6 + 2.4 K with `f16`, 3 %
    less where the code is alike; fewer distinct ids need less. With top-p a row may have one entry alone, and of
    samples few are distinct.
    """
    entries = config.top_k if config.top_p is None else 1
    if tokenizer_size >= _LARGE_VOCABULARY:
        each = 1.45 if config.codec == "q" else 2.3
    else:
        each = 1.0 if config.codec == "q" else 1.8
    return 5 + each * min(entries, tokenizer_size) + 0.3 * (config.samples or 0)


def free_bytes(out: Path) -> int:
    """What the disk of a folder, which need not exist yet, has left for this user."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_room(out: Path, num_tokens: int, bytes_per_token: float, *, present_bytes: int = 0) -> None:
    """Refuse to label tokens that the disk cannot hold.

    Args:
        out: the cache's folder.
        num_tokens: tokens still to be labelled.
        bytes_per_token: what they take each.
        present_bytes: of that, what is there already.

    Raises:
        ConfigError: with the figures.
    """
    need, free = round(num_tokens * bytes_per_token) - present_bytes, free_bytes(out)
    if need > free:
        raise ConfigError(
            "the disk cannot hold the cache",
            where=out,
            expected=f"{need:,} bytes free ({num_tokens:,} tokens at {bytes_per_token:.0f} bytes or more)",
            got=f"{free:,} bytes free",
            fix="make room and run the same command again, which keeps finished shards; or name an --out on another "
            "disk, with a smaller --top-k or a --top-p",
        )
