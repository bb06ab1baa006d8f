"""How a model is asked to continue a prompt: base models by the prompt itself, chat models by their template."""

import ast
import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass

from data.syntax import Function, body_of, functions_in
from data.templates import normalise
from shared.chat import chat_prompt
from shared.eval.programs.completion import Ending, ending_after, parse, program_end
from shared.tokenizer import Tokenizer, encode_prompt

QUESTION = (
    "Complete this Python program. Answer with the whole program in one Python code block and nothing else.\n\n"
    "```python\n{prompt}\n```"
)
_BLOCK = re.compile(r"^[^`\n]*```[^\n]*\n(?P<code>.*?)(?P<end>^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Style:
    """One way to ask: `prompt`, or `chat` (`QUESTION`, rendered by the tokenizer's chat template)."""

    name: str = "prompt"

    def encode(self, tokenizer: Tokenizer, prompt: str) -> list[int]:
        """The ids that the model is given."""
        if self.name == "prompt":
            return encode_prompt(tokenizer, prompt)
        return chat_prompt(tokenizer, [{"role": "user", "content": QUESTION.format(prompt=prompt)}])

    def ending(self, prompt: str, special: Collection[str]) -> Ending:
        """What finds the end of the model's text."""
        return ending_after(prompt, special) if self.name == "prompt" else answer_end

    def completion(self, prompt: str, text: str, end: Ending) -> str:
        """What the model's text adds to the prompt."""
        return text[: end(text)] if self.name == "prompt" else continuation(prompt, text)


PROMPT, CHAT = Style(), Style("chat")


def answer_end(text: str) -> int | None:
    """The end of the first code block; None while it is open, or where there is none."""
    block = _BLOCK.search(text)
    return block.end() if block and block["end"] else None


def continuation(prompt: str, answer: str) -> str:
    """What the program in a chat's answer adds to the prompt.

    A model repeats the prompt, changes its docstring, or writes nothing but the body. After the head of a function this
    is the body of the function of that name, with imports of the answer at its start; after a description, which a
    whole program answers, the answer's code without the prompt and up to its own tests (`program_end`). An answer
    without a code block is taken as code.
    """
    block = _BLOCK.search(answer)
    code = normalise(block["code"] if block else answer)
    name, indent = _open_function(prompt)
    if name is None:
        program = "\n" + code.strip().removeprefix(prompt.strip()).lstrip("\n")
        return program[: program_end(program)].rstrip() + "\n"
    tree = parse(code)
    function = next((each for each in functions_in(tree) if each.name == name), None) if tree else None
    if tree is None or function is None:
        return "\n" + _indented(code.strip("\n"), indent) + "\n"
    body = body_of(function)
    if not body:
        return "\n"
    lines, before = code.split("\n"), list[str]()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and not _stands_in(node, prompt):
            before += [indent + line for line in lines[node.lineno - 1 : node.end_lineno]]
    return "\n" + "\n".join([*before, _indented(_source(body[0], lines, function.end_lineno), indent)]) + "\n"


def _source(first: ast.stmt, lines: list[str], end: int | None) -> str:
    """The source from a statement on, with its decorators and without what stands before it on its line."""
    line = lines[first.lineno - 1]
    before, after = (part.decode() for part in (line.encode()[: first.col_offset], line.encode()[first.col_offset :]))
    start = min([first.lineno, *(node.lineno for node in getattr(first, "decorator_list", []))])
    above = lines[start - 1 : first.lineno - 1]
    return "\n".join([*above, _indentation(before) + after, *lines[first.lineno : end]])


def _indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _indented(text: str, indent: str) -> str:
    """Code at an indentation; code that has it already stays, for strings of several lines cannot be moved."""
    return text if _indentation(text) == indent else textwrap.indent(textwrap.dedent(text), indent)


def _open_function(prompt: str) -> tuple[str | None, str]:
    """The function whose body a prompt waits for, None where a whole program answers it; and the body's indentation."""
    for text in (prompt, prompt + "\n    pass"):
        if (tree := parse(text)) is not None:
            last = tree.body[-1] if tree.body else None
            if isinstance(last, Function):
                return last.name, _indentation(text.split("\n")[last.body[0].lineno - 1]) or "    "
            break
    return None, ""


def _stands_in(node: ast.stmt, prompt: str) -> bool:
    return re.search(rf"^{re.escape(ast.unparse(node))}\s*$", prompt, re.MULTILINE) is not None
