"""How rows and problems become text.

Prompts never end in white space: BPE merges a newline with the indentation that follows, so the white space belongs
to the completion, in training as in generation.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from data.records import Document, Problem
from data.tabular import Row


def normalise(text: str) -> str:
    """Line ends as LF, from CRLF and bare CR; everything else, tabs too, stays."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def end_line(text: str) -> str:
    """The text with exactly one final newline."""
    return text.rstrip("\n") + "\n"


def prompt_document(id: str, source: str, prompt: str, completion: str, **written: Any) -> Document:
    """A document from two texts; white space at the prompt's end moves to the completion. `written`: see `Document`."""
    prompt, completion = normalise(prompt), normalise(completion)
    border = len(prompt.rstrip())
    text = prompt[border:] + completion
    ended = text if written.get("is_cut") else end_line(text)
    return Document(id=id, source=source, prompt=prompt[:border], completion=ended, **written)


def chat_document(id: str, source: str, messages: Iterable[Mapping[str, str]]) -> Document:
    """A document from a chat; the tokenizer's chat template renders it."""
    normal = tuple({"role": m["role"], "content": normalise(m["content"])} for m in messages)
    return Document(id=id, source=source, messages=normal)


def mbpp_document(row: Row) -> Document:
    """A row of MBPP, full (`text`) or sanitized (`prompt`) columns: description and tests as docstring, then the code.

    The form is that of Austin et al. 2021 (arXiv:2108.07732), as the BigCode evaluation harness renders it.
    """
    description = row.text("text" if "text" in row.fields else "prompt", blank=False)
    tests = "\n".join(row.texts("test_list"))
    code = row.text("code", blank=False)
    return prompt_document(f"mbpp/{row.integer('task_id')}", "mbpp", f'"""\n{description}\n{tests}\n"""', f"\n{code}")


def humaneval_prompt(problem: Problem) -> str:
    """What a model is given: the problem's prompt without the white space at its end."""
    return normalise(problem.prompt).rstrip()
