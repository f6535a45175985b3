"""The answers of SGLang's own MUSA backend on the simulated GPU, without this package.

``python -m tests.simulated_musa.in_tree [CASE...]`` boots the engine of each case (all that one GPU
serves, where none is named) with ``--attention-backend fa3`` and this package off, and says how far
its worst token is from transformers' choice. The case, its model and its requests are in
``cases.py``.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tests.simulated_musa import build
from tests.simulated_musa.cases import CASES, FA3, MusaCase, run_case, worst
from tests.support.engine import EngineFailed, EngineServer

ALONE = {"SGLANG_MUSA_EXT": "off", "SIMULATED_MATE_PLANS": "any"}
"""The environment of an engine without this package, whose stale plans do what a GPU makes of them.
"""


def verdict(musa: EngineServer, case: MusaCase) -> str:
    """Return what became of ``case``, as a line."""
    named = replace(case, arguments={**case.arguments, **FA3})
    try:
        run = run_case(musa, named, environ=ALONE)
    except EngineFailed as failure:
        lines = [line for line in failure.log.splitlines() if "Error" in line]
        return f"fails: {lines[-1].strip()[:160] if lines else str(failure).splitlines()[0]}"
    gap = worst(musa, case, run.outputs)
    if gap <= case.limit:
        return f"right (at most {gap:.3f} below the best)"
    return f"WRONG: a token is {gap:.2f} below the best, in log-probability"


def main(names: list[str]) -> None:
    """Print a line for each case."""
    chosen = [case for case in CASES if case.name in names or not names]
    with tempfile.TemporaryDirectory() as directory:
        musa = EngineServer(Path(directory), build.environment())
        try:
            for case in chosen:
                print(f"{case.name}: {verdict(musa, case)}", flush=True)
        finally:
            musa.close()


if __name__ == "__main__":
    main(sys.argv[1:])
