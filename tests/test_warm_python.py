"""What runs in a fork of the warm Python runs as in a Python of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.warm import WarmPython

SHOWN = """
import json, os, sys
ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("sglang", "tests"))
# Torch's import, which a Python of its own does here, starts the package. One kind shows that.
if sys.argv[0] == "-c":
    import torch
else:
    sys.meta_path.clear()
finders = [type(finder).__module__ for finder in sys.meta_path]
print(json.dumps([
    sys.argv, os.getcwd(), sys.path[0], os.environ.get("GIVEN"), "HOME" in os.environ, ours,
    finders.count("sglang_musa_ext.patching"), __name__, sys.stdin.read(),
]))
print("beside", file=sys.stderr)
"""
ENDS = {
    "a status": "import sys; sys.exit(3)",
    "a message": "import sys; sys.exit('what went wrong')",
    "no status": "import sys; sys.exit()",
    "an error": "raise ValueError('wrong')",
    "a signal": "import os; os.kill(os.getpid(), 15)",
    "the end": "import atexit; atexit.register(print, 'at the end'); print('before')",
}


def own_python(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in a Python of its own."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("kind", ["code", "module", "script"])
def test_a_program_sees_what_it_would_see(warm: WarmPython, tmp_path: Path, kind: str) -> None:
    """Arguments, folder, search path, variables, what is imported, and the guard."""
    (tmp_path / "shown.py").write_text(SHOWN)
    words = {"code": ["-c", SHOWN], "module": ["-m", "shown"], "script": ["shown.py"]}[kind]
    command = [sys.executable, *words, "--an", "argument"]
    env = {"GIVEN": "yes", "SGLANG_MUSA_EXT": "on", "PYTHONPATH": str(tmp_path)}
    expected, done = (run(command, env=env, cwd=tmp_path) for run in (own_python, warm.run))
    assert expected.returncode == 0
    assert (done.returncode, done.stdout) == (0, expected.stdout)
    assert done.stderr == expected.stderr == "beside\n"


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_it_would_end(warm: WarmPython, end: str) -> None:
    """Its status, what it prints at its end, and the last line of its error."""
    command = [sys.executable, "-c", ENDS[end]]
    expected, done = own_python(command), warm.run(command)
    assert (done.returncode, done.stdout) == (expected.returncode, expected.stdout)
    assert done.stderr.splitlines()[-1:] == expected.stderr.splitlines()[-1:]


def test_a_program_of_a_program_is_a_fork_too(warm: WarmPython) -> None:
    """With its pipes, and other descriptors where it is given them."""
    code = """
import os, subprocess, sys
reading, writing = os.pipe()
inner = f"import os, sys; os.write({writing}, b'apart'); print('torch' in sys.modules, input())"
command = [sys.executable, "-c", inner]
done = subprocess.run(command, input="said", capture_output=True, text=True, pass_fds=[writing])
os.close(writing)
print(done.returncode, done.stdout.strip(), done.stderr, os.read(reading, 99), os.read(reading, 9))
"""
    done = warm.run([sys.executable, "-c", code])
    assert done.stdout == "0 True said  b'apart' b''\n", done.stderr


def test_a_program_that_takes_too_long_is_ended(warm: WarmPython) -> None:
    """With what it has started, and the next program runs."""
    code = "import subprocess; subprocess.run(['sleep', '600'])"
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run([sys.executable, "-c", code], timeout=0.5)
    assert warm.run([sys.executable, "-c", "print('next')"]).stdout == "next\n"
