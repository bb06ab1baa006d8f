"""Where a completion ends: by syntax, without parsing, so that unfinished and broken code is handled too."""

import re

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
    depth = 0
    for token in _TOKEN.finditer(text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth = max(depth - 1, 0)
        elif token["newline"] and depth == 0:
            following = text[token.end() : token.end() + 1]
            if following and following not in " \t\f\r\n#":
                return token.end()
    return None


def cut(text: str) -> str:
    """The part of `text` that belongs to the function body; all of it where no end is found."""
    return text[: body_end(text)]
