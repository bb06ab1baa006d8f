"""Where a completion ends."""

import pytest

from shared.eval.completion import body_end, cut

BODY = "\n    return 1\n"


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
