"""The commands of README.md, for the tests that run them."""

import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", README, re.MULTILINE))


def commands_of(section):
    """The commands of a section's blocks, as words; continued lines are one command, comments and `#SBATCH` none."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
