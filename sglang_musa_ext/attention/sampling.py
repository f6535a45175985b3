"""``SGLANG_MUSA_EXT_CHECK=output:SHARE``: some calls of a serving backend, compared and reported.

Where ``output`` raises at the first difference, this one counts: what was compared in each mode,
the largest error there, and what could not be compared. A replayed graph runs no Python, so its
calls are not seen at all.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sglang_musa_ext.attention import checks
from sglang_musa_ext.attention.calls import Arguments, KnownCall
from sglang_musa_ext.attention.plans import SchedulerMetadataCache
from sglang_musa_ext.kernels.provider import reference_kernels

logger = logging.getLogger(__name__)

MOST_KEYS = 32768
"""Keys of the longest context that is compared: the reference holds a row of scores for each."""
MOST_SCORES = 1 << 26
"""Query rows times keys of a call that is compared; more would hold up serving for seconds."""
CALLS_A_LINE = 100
"""Chosen calls between two lines in the log, whether they could be compared or not."""


@dataclass
class ModeErrors:
    """The result of comparing the calls of one mode."""

    compared: int = 0
    wrong: int = 0
    """Calls with a value beyond the tolerance of the dtype, or with an unwritten row."""
    largest_error: float = 0.0
    """The largest absolute difference of a written value."""


class OutputSampler:
    """Compares a share of one backend's calls with the reference kernels; raises nothing.

    The reference computes in float32 and rounds to the dtype of the output. It plans for itself and
    reads the paged cache, also where the call read the layer's own keys.
    """

    def __init__(self, share: float, plans: SchedulerMetadataCache, device: torch.device) -> None:
        """Sample ``share`` (0 to 1) of the calls that ``plans`` knows of."""
        self.share = share
        self._plans, self._device = plans, device
        self._modes: dict[str, ModeErrors] = {}
        self._unchecked: Counter[str] = Counter()
        self._chosen = False
        """True if the running call over a paged cache is to be compared."""
        self._calls = 0
        """Calls that were chosen."""
        # A generator of its own: SGLang seeds the process's, and models draw from it.
        self._random = random.Random(0)

    def around(self, function: str, served: Callable[[Arguments], Any]) -> Callable[..., Any]:
        """Return what serves calls as ``served`` does, and compares some of them.

        Args:
            function: the FA3 function that the calls are of.
            served: takes the arguments as one dict, and may change it.
        """

        def call(arguments: Arguments) -> Any:
            if self._random.random() >= self.share:
                return served(arguments)
            return self._compared(function, served, arguments)

        return call

    def choosing(self, begin_call: Callable[[], Sequence[KnownCall]]) -> Callable[..., Any]:
        """Return what begins calls as ``begin_call`` does, and chooses some to be compared.

        A chosen call is said to be like none before it, in its pass or in those before, so that
        :meth:`of_chosen` sees it.
        """

        def begin() -> Sequence[KnownCall]:
            known = begin_call()
            self._chosen = self._random.random() < self.share
            if self._chosen:
                self._plans.current.earlier.clear()
                return ()
            return known

        return begin

    def of_chosen(self, function: str, served: Callable[[Arguments], Any]) -> Callable[..., Any]:
        """Return what serves calls as ``served`` does, and compares the chosen ones."""

        def call(arguments: Arguments) -> Any:
            if not self._chosen:
                return served(arguments)
            return self._compared(function, served, arguments)

        return call

    def _compared(
        self, function: str, served: Callable[[Arguments], Any], arguments: Arguments
    ) -> Any:
        kept = dict(arguments)
        result = served(arguments)
        self._compare(function, kept, result)
        self._calls += 1
        if self._calls % CALLS_A_LINE == 0:
            logger.info("sglang_musa_ext compared outputs: %s", self.report())
        return result

    def report(self) -> dict[str, Any]:
        """Return the counts as plain data that JSON can carry."""
        return {
            "share": self.share,
            "modes": {mode: asdict(errors) for mode, errors in sorted(self._modes.items())},
            "unchecked": dict(self._unchecked),
        }

    def _compare(self, function: str, arguments: Arguments, result: Any) -> None:
        if self._plans.capturing:
            self._unchecked["captured"] += 1
            return
        try:
            if _is_long(arguments):
                self._unchecked["long"] += 1
                return
            expected = self._expected(function, arguments)
            output = checks.output_of(result)
            wrong = checks.wrong_values(output, expected, arguments["q"].dtype)
            self._note(self._mode(function), output, expected, bool(wrong.any()))
        except Exception as error:  # noqa: BLE001 - whatever this is, the request has its answer
            self._unchecked[type(error).__name__] += 1
            if self._unchecked[type(error).__name__] == 1:
                logger.warning("sglang_musa_ext could not compare a call: %s", error)

    def _expected(self, function: str, arguments: Arguments) -> torch.Tensor:
        kernels = reference_kernels()
        asked = arguments | {"out": None}
        if function == "flash_attn_varlen_func":
            asked.pop("scheduler_metadata", None)
            return checks.output_of(kernels.flash_attn_varlen_func(**asked))
        if asked.get("k") is None:
            # FA3 reads it as lengths of keys to be appended, and there are none.
            asked.pop("cu_seqlens_k_new", None)
        asked["scheduler_metadata"] = checks.reference_plan(arguments, self._device)
        return checks.output_of(kernels.flash_attn_with_kvcache(**asked))

    def _mode(self, function: str) -> str:
        mode = getattr(self._plans.forward_batch, "forward_mode", None)
        name = getattr(mode, "name", "no batch").lower()
        return f"{name}, raw keys" if function == "flash_attn_varlen_func" else name

    def _note(
        self, mode: str, output: torch.Tensor, expected: torch.Tensor, is_wrong: bool
    ) -> None:
        errors = self._modes.setdefault(mode, ModeErrors())
        errors.compared += 1
        # Rows that no query owns are NaN in the reference.
        owned = ~expected.isnan()
        difference = (output.float() - expected.float()).abs().where(owned, 0.0)
        largest = float(difference.nan_to_num(0.0).max())
        errors.largest_error = max(errors.largest_error, largest)
        if is_wrong:
            errors.wrong += 1
            logger.warning(
                "sglang_musa_ext: an output of mode %s differs from the reference by up to %.3g, "
                "call %d of %d compared ones that does. Please report this with the model and the "
                "versions of the kernels.", mode, largest, errors.wrong, errors.compared,
            )  # fmt: skip


def _is_long(arguments: Arguments) -> bool:
    """Tell whether a call is too long to compare; waits for the device."""
    rows = arguments["q"].shape[:-2].numel()
    lengths = arguments.get("cache_seqlens")
    keys = arguments["k"].shape[0] if lengths is None else int(lengths.max())
    return keys > MOST_KEYS or rows * keys > MOST_SCORES
