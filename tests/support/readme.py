"""The commands of the READMEs, for the tests that run them."""

import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDERS = (".", "data", "stage1_teacher", "stage2_student", "shared/cache", "shared/eval", "shared/eval/sandbox")
READMES = {folder: (REPOSITORY / folder / "README.md").read_text() for folder in FOLDERS}
# (folder, heading) → the section's text
SECTIONS = {
    (folder, title): text
    for folder, readme in READMES.items()
    for title, text in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", readme, re.MULTILINE)
}


def blocks_of(section, language):
    """The fenced blocks of one language in a section."""
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)


def commands_of(section):
    """The commands of a section's bash blocks, as words; continued lines joined, comments left out."""
    lines = "".join(blocks_of(section, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
