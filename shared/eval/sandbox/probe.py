"""Whether isolation layers hold here: programs that try what must be refused."""

import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared import errors
from shared.errors import SandboxError
from shared.eval.sandbox.policy import Isolation
from shared.eval.sandbox.worker import Candidate, Worker

PROBE_SECONDS = 30.0
CHOICES = (Isolation.FULL, Isolation.WITHOUT_NAMESPACES)  # the best first
_TEST = "def check(candidate):\n    assert candidate() == 'refused'\n"


def attempts() -> dict[str, Candidate]:
    """What is tried, by name; each returns `refused` where the layers hold."""
    name = f"probe-{secrets.token_hex(8)}"
    targets = [str(folder / name) for folder in (Path(tempfile.gettempdir()), Path.home(), Path("/dev/shm"))]
    actions = {
        "network": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
        "sockets": "import socket; socket.socket(socket.AF_UNIX)",
        "processes": "import os; os.fork() or os._exit(0)",
        "programs": f"import os; os.execv({sys.executable!r}, ['python', '-c', 'pass'])",
        "signals": "import os; os.kill(os.getppid(), 0)",
        **{f"writing {Path(target).parent}": f"open({target!r}, 'x')" for target in targets},
        "reading": f"open({errors.__file__!r}).read()",
        "reading /etc/passwd": "open('/etc/passwd').read()",
        "listing /": "import os; assert not {'etc', 'home'} & {*os.listdir('/')}; raise PermissionError",
    }
    return {
        about: Candidate(
            prompt="",
            completion=f"def f():\n    try:\n        {action}\n    except OSError:\n        return 'refused'\n",
            test=_TEST,
            entry_point="f",
        )
        for about, action in actions.items()
    }


def probe(isolation: Isolation) -> dict[str, str]:
    """What each attempt came to behind these layers: `refused`, or what happened instead.

    Raises:
        SandboxError: the layers cannot be put up, or a right program does not pass behind them.
    """
    if sys.platform != "linux":
        raise SandboxError("no isolation", where=isolation.value, got=f"{sys.platform}; only Linux has it")
    control = Candidate(
        prompt="",
        completion="def f(x):\n    return x\n",
        test="def check(f):\n    assert f([1]) == [1]\n",
        entry_point="f",
    )
    with Worker(isolation) as worker:
        worker.wait_ready()
        verdict = worker.run(control, PROBE_SECONDS)
        if verdict.verdict != "passed":
            got = f"{verdict.verdict}: {verdict.detail}"
            raise SandboxError("a right program does not pass", where=isolation.value, got=got)
        outcomes = {}
        for about, candidate in attempts().items():
            verdict = worker.run(candidate, PROBE_SECONDS)
            outcomes[about] = "refused" if verdict.verdict == "passed" else f"{verdict.verdict}: {verdict.detail}"
    return outcomes


def probe_all() -> Iterator[tuple[Isolation, dict[str, str], str]]:
    """Of each choice, the best first: itself, what each attempt came to, and why it does not hold, empty if it does."""
    for isolation in CHOICES:
        try:
            outcomes = probe(isolation)
        except SandboxError as error:
            yield isolation, {}, str(error.got)
            continue
        open_ways = [about for about, outcome in outcomes.items() if outcome != "refused"]
        yield isolation, outcomes, f"not refused: {', '.join(open_ways)}" if open_ways else ""
