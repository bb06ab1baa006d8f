"""Where a completion ends: by syntax, without parsing, so that unfinished and broken code is handled too."""

import ast
import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence

from data import syntax

ENDS = (
    "a body: first code in column 0; a program: assert, print, if __name__, a string, a backtick or < in column 0; "
    "both: a special token spelled out, outside strings and comments"
)

# Strings and comments are skipped whole; what is left that matters is brackets and line ends. String prefixes need no
# care: in raw strings too, a backslash keeps the quote after it from closing the string.
_TOKEN = re.compile(
    r"""
      \#[^\r\n]*
    | \"{3} (?:\\.|[^\\])*? (?:\"{3}|\Z)
    | '{3}  (?:\\.|[^\\])*? (?:'{3}|\Z)
    | \" (?:\\(?:\r\n|.)|[^\"\\\r\n])* \"?
    | '  (?:\\(?:\r\n|.)|[^'\\\r\n])* '?
    | (?P<continuation> \\(?:\r\n|\r|\n))
    | (?P<open> [(\[{])
    | (?P<close> [)\]}])
    | (?P<newline> \r\n|\r|\n)
    """,
    re.VERBOSE | re.DOTALL,
)

Ending = Callable[[str], int | None]  # `body_end` or `program_end`, with stops or without

# What no answer that is a whole program goes on with: its own tests, the next task, Markdown, tags.
_AFTERMATH = re.compile(r"""(?:assert|print)(?=\W) | if\s+__name__ | ["'`<]""", re.VERBOSE)


def ending_after(prompt: str, special: Collection[str] = ()) -> Ending:
    """What finds the end of a prompt's completion: `body_end` where the prompt ends inside a function, a class or
    something else unfinished, such as a head without docstring; otherwise `program_end`. Either way a special token
    (`special` has their texts) that is spelled out ends it too (see `spelled_end`).
    """
    tree = parse(prompt)
    unfinished = tree is None or bool(
        tree.body and isinstance(tree.body[-1], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    )
    end = body_end if unfinished else program_end
    stops = [text for text in special if is_never_code(text)]
    return functools.partial(_first_end, end, stops) if stops else end


def is_never_code(text: str) -> bool:
    """Whether Python code can hold a text only in strings and comments: `<|endoftext|>`, but not the `<s>` of `a<s>b`.

    Texts with white space are not asked about: they count as code.
    """
    if not text or any(map(str.isspace, text)):
        return False
    return all(parse(before + text + after) is None for before in ("", "a") for after in ("", "b"))


def spelled_end(text: str, stops: Sequence[str]) -> int | None:
    """Find the first of `stops` in a text that is in no string and no comment.

    A model may write the text of a special token instead of the token. In code it cannot be part of a program, so it
    ends one as the token does; in a string or a comment it is the program's own.

    Args:
        text: generated text, possibly cut off anywhere.
        stops: texts that are never code (see `is_never_code`).

    Returns:
        Where it begins, or None. A later call with more text returns the same index once one is found.
    """
    longest_first = "|".join(re.escape(stop) for stop in sorted(stops, key=len, reverse=True))
    found = re.finditer(f"(?P<stop> {longest_first}) | (?: {_TOKEN.pattern} )", text, _TOKEN.flags)
    return next((token.start() for token in found if token["stop"]), None)


def _first_end(end: Ending, stops: Sequence[str], text: str) -> int | None:
    found = [at for at in (end(text), spelled_end(text, stops)) if at is not None]
    return min(found, default=None)


def parse(program: str) -> ast.Module | None:
    """The syntax tree of a program; None where it is no Python."""
    try:
        return syntax.parse(program)
    except syntax.NOT_PYTHON:
        return None


def body_end(text: str) -> int | None:
    """Find where a function's body, of which `text` is the continuation, ends.

    The body ends before the first line that has code in column 0 and is no continuation of the line before: not inside
    a string or brackets and not after a backslash. Blank lines and comments in column 0 end nothing. `text` goes on
    from inside the body or the line above it, so its own first line never counts.

    Args:
        text: generated text, possibly cut off anywhere.

    Returns:
        The index of the first character after the body, or None where the text holds no such line. A later call with
        more text appended returns the same index once one is found.
    """
    return next((start for start in _line_starts(text) if text[start] not in " \t\f\r\n#"), None)


def program_end(text: str) -> int | None:
    """Find where a whole program, which `text` begins on a line of its own, ends.

    It ends before the first line after some text, no continuation of the one before, that begins in column 0 with
    `assert`, `print`, `if __name__`, a string, a backtick or `<`. Arguments and result as in `body_end`.
    """
    starts = (start for start in _line_starts(text) if _AFTERMATH.match(text, start))
    return next((start for start in starts if not text[:start].isspace()), None)


def _line_starts(text: str) -> Iterator[int]:
    """Where lines begin, the first one and those inside strings, brackets and after backslashes excepted."""
    depth = 0
    for token in _TOKEN.finditer(text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth = max(depth - 1, 0)
        elif token["newline"] and depth == 0 and token.end() < len(text):
            yield token.end()
