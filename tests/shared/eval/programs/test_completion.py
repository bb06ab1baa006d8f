"""Where a completion ends."""

import pytest

from shared.eval.programs.completion import (
    body_end,
    ending_after,
    is_never_code,
    parse,
    program_end,
)

BODY = "\n    return 1\n"


def cut(text):
    return text[: body_end(text)]


@pytest.mark.parametrize(
    "tail",
    [
        "print(1)\n",
        "def g():\n",
        "class A:\n",
        "@decorated\n",
        "if __name__ == '__main__':\n",
        '"""text"""\n',
        "x",
        ")",
    ],
)
def test_code_in_column_0_ends_the_body(tail):
    assert body_end(BODY + tail) == len(BODY)
    assert cut(BODY + tail) == BODY


@pytest.mark.parametrize(
    "inside",
    [
        "\n    x = 1\n# a comment in column 0\n    return x\n",
        "\n    def inner(y):\n        return y\n\n\n    return inner\n",
        '\n    text = """first\nprint(1) in a string\n"""\n    return text\n',
        "\n    text = '''a\\'''\ndef g():\n'''\n    return text\n",
        "\n    x = [\n1,\n2,\n]\n    return x\n",
        "\n    x = f(')',\ny)\n",
        "\n    x = 1 + \\\n2\n    return x\n",
        "\n    x = 'a\\\nb'\n    return x\n",
        "\n    x = ']'  # ( unbalanced [ in a comment\n    return x\n",
        "\n\tx = 1\r\n\r\n\treturn x\r\n",
        ' # the line of the prompt goes on\n    r"\\"\n    return 1\n',
    ],
)
def test_what_belongs_to_the_body_is_kept(inside):
    assert body_end(inside) is None
    assert cut(inside) == inside
    assert cut(inside + "\n" + "after = 1\n") == inside + "\n"


def test_the_first_line_continues_the_prompt_and_never_ends_it():
    assert body_end("x = 1\n    return x") is None
    assert body_end("") is None


def test_unfinished_and_broken_code():
    assert body_end("\n    return (1 +") is None
    assert body_end('\n    """never closed\nprint(1)\n') is None
    assert cut("\n    x = 'never closed\nprint(1)\n") == "\n    x = 'never closed\n"
    assert cut("\n    x = )))\nprint(1)\n") == "\n    x = )))\n"


def test_an_end_once_found_stays_as_text_grows():
    text = '\n    x = """a\nb"""\n\n# c\n    return (x,\n1)\n\n\ndef g():\n    """s\nt"""\nprint(")\n'
    end = text.index("def g")
    found = [body_end(text[:length]) for length in range(len(text) + 1)]
    assert found == [None] * (end + 1) + [end] * (len(text) - end)


@pytest.mark.parametrize(
    ("prompt", "ending"),
    [
        ("def f(x):", body_end),
        ('import math\n\n\ndef f(x):\n    """Doc."""', body_end),
        ("def g():\n    return 1\n\n\nasync def f(x):\n    # so\n    pass", body_end),
        ("class A:\n    x = 1", body_end),
        ("def f(x):\n    if x:", body_end),
        ('"""\nWrite a function.\nassert f(1) == 2\n"""', program_end),
        ("# Write a function.", program_end),
        ("", program_end),
        ("import math", program_end),
    ],
)
def test_the_prompt_says_what_its_completion_is(prompt, ending):
    assert ending_after(prompt) is ending


PROGRAM = '''
import re
# a comment
LIMIT = [
1,
]
@decorated
class Node:
    """print(1)
print(2)
"""


def f(x):
    assert x
    return x
printed = """
assert f(1)
"""
if LIMIT:
    f = f
'''


@pytest.mark.parametrize(
    "tail", ["assert f(1) == 1", "print(f(1))", 'if __name__ == "__main__":', '"""next"""', "```", "<|"]
)
def test_a_program_ends_before_what_is_no_part_of_an_answer(tail):
    assert program_end(PROGRAM) is None
    assert program_end(PROGRAM + tail + "\ndef g(): pass\n") == len(PROGRAM)
    found = [program_end((PROGRAM + tail)[:length]) for length in range(len(PROGRAM + tail) + 1)]
    first = found.index(len(PROGRAM))
    assert found == [None] * first + [len(PROGRAM)] * (len(found) - first)


def test_a_program_does_not_end_before_it_begins():
    assert program_end('\n"""Doc."""\nx = 1\n') is None
    assert program_end("\n\nassertion = 1\nprinter = 2\nif_ = 3\n") is None


def test_what_parses(recwarn):
    assert parse("x = '\\d'\nreturn 1") is not None  # a tree is all that is asked for
    for text in ("def f(:", "x = 1\0", "'\ud800'", "(" * 500, "-" * 100_000 + "1"):
        assert parse(text) is None
    assert not recwarn.list


END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("text", "is_never"),
    [
        ("<|endoftext|>", True),
        ("<|im_end|>", True),
        ("</s>", True),
        ("<｜end▁of▁sentence｜>", True),
        ("<s>", False),  # a<s>b is a comparison
        ("<file_sep>", False),
        ("[PAD]", False),
        ("END", False),
        ("#", False),
        ("", False),
        ("<| end |>", False),
    ],
)
def test_which_special_tokens_python_can_never_hold(text, is_never):
    assert is_never_code(text) is is_never


@pytest.mark.parametrize(
    ("before", "end_of_body"),
    [("\n    return 1", 13), ("\n    return (1,", 15), ("\n    ", 5), ("", 0), ("\nx = 'a'", 1), ("\nx = 1\n", 1)],
)
def test_a_special_token_that_is_spelled_out_ends_a_completion(before, end_of_body):
    text = before + END + "\n    y = 2\n"
    for prompt, expected in (("def f(x):", end_of_body), ("# Write a function.", len(before))):
        end = ending_after(prompt, [END, "<s>"])
        found = [end(text[:length]) for length in range(len(text) + 1)]
        first = found.index(expected)
        assert found == [None] * first + [expected] * (len(found) - first)


@pytest.mark.parametrize(
    "text",
    [
        "\n    return text.split('<|endoftext|>')\n",
        '\n    """Cut at\n<|endoftext|>.\n    """\n    return 1\n',
        "\n    # up to <|endoftext|>\n    return 1\n",
        "\n    return f'{x}<|endoftext|>'\n",
        "\n    return a<s>b\n",
        "\n    return '<|endoftext",
        "\n    return a <|endo",
    ],
)
def test_in_strings_and_comments_it_is_the_program_s_own(text):
    assert ending_after("def f(x):", [END, "<s>"])(text) is None
