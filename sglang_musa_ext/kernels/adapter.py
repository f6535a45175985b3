"""Calls with FA3's keyword names, on functions that differ in names and in what they do.

What a call needs is settled by its argument names, once a call site; then by its *traits*, the
types and options that it has, once for each that the site sees; and last by its tensors, in every
call. So a further call costs the host a few comparisons.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sglang_musa_ext.kernels.record import (
    Settle,
    SettledCall,
    UnsupportedKernelArgument,
    settled_anew,
    takes_by_position,
)

Arguments = dict[str, Any]
Rule = Callable[[Arguments], Arguments]
"""Returns a call's arguments as the function wants them, or raises. The answer follows from the
call's names and traits alone, and what a rule puts in is no tensor.
"""
Step = Callable[[Arguments], None]
"""Changes the arguments of one call, in place."""
Finish = Callable[[Any], Any]
"""Returns what FA3 would return, from what the function returned."""

_SYNONYMS = (
    ("sinks", "s_aux", "learnable_sink"),
    ("page_table", "block_table"),
    ("cache_seqlens", "seqused_k"),
    ("cache_leftpad", "leftpad_k"),
    ("num_heads_q", "num_heads"),
    ("num_heads_kv", "num_heads_k"),
    ("sm_margin", "mp_margin"),
    ("return_softmax_lse", "return_attn_probs"),
)
"""Names that FA3's interfaces have for one and the same argument."""


class StepRule(NamedTuple):
    """A step, and the calls that take it."""

    applies: Callable[[Arguments], bool]
    """Answers by the call's names and traits alone."""
    step: Step
    """Changes every call, or decides by queries, keys, values, page table and lengths alone."""
    by_layout: bool = False
    """True if it decides by dtypes and layouts alone, which all calls of a kind share."""


class FinishRule(NamedTuple):
    """A change of the result, and the calls whose results it changes."""

    applies: Callable[[Arguments], bool]
    """Answers by the call's names and traits alone."""
    finish: Finish


class AdaptedFunction:
    """A function of a library, callable the way upstream's forwards call FA3.

    It takes keywords alone. ``ver=3``, and arguments that the library lacks, are dropped where they
    ask for nothing, and refused by name otherwise; ``out=`` is honoured.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        rules: Sequence[Rule] = (),
        steps: Sequence[StepRule] = (),
        finishes: Sequence[FinishRule] = (),
        traits: Callable[[tuple[str, ...]], Callable[[Arguments], Any]] | None = None,
    ) -> None:
        """Read the signature of ``function``.

        Args:
            function: of a library with FA3's interface.
            rules: are asked in this order, with FA3's names, once for each names and traits.
            steps: are taken in this order, in every call that they apply to.
            finishes: likewise, of results.
            traits: returns, for a call site's argument names, what reads off a call everything that
                rules, steps and finishes decide by; ``None``: they decide by names alone.
        """
        functools.update_wrapper(self, function)
        self.function = function
        self.rules, self.steps, self.finishes = tuple(rules), tuple(steps), tuple(finishes)
        self.traits_of = traits
        self.parameters = inspect.signature(function).parameters
        kinds = [parameter.kind for parameter in self.parameters.values()]
        self.takes_any = inspect.Parameter.VAR_KEYWORD in kinds
        self.own_names = _own_names(self.parameters)
        self._sites: dict[tuple[str, ...], CallAdapter] = {}

    def __call__(self, **arguments: Any) -> Any:
        """Call the function with FA3's keywords."""
        return self.prepare(tuple(arguments))(arguments)

    def prepare(self, names: tuple[str, ...]) -> CallAdapter:
        """Return what serves calls whose arguments have exactly these names."""
        site = self._sites.get(names)
        if site is None:
            site = self._sites[names] = CallAdapter(self, names)
        return site

    def lacks(self, name: str) -> bool:
        """Return whether the function has no argument for FA3's ``name``."""
        return name not in self.parameters and name not in self.own_names

    def refuse(self, name: str) -> None:
        """Raise for a call that needs an argument that the function lacks."""
        raise UnsupportedKernelArgument(
            f"{_name(self.function)} has no argument {name!r}, and the call needs it: "
            "the model uses a feature that these kernels do not have. Serve it with another "
            "--attention-backend."
        )


class _Translation(NamedTuple):
    """The way in which calls of a site with the same traits are made."""

    dropped: tuple[str, ...]
    given: Arguments
    """Values in place of those of the call, or beside them."""
    steps: tuple[Step, ...]
    steps_by_lengths: tuple[Step, ...]
    """Those of the steps that a call may need while another of its kind does not."""
    renamed: tuple[tuple[str, str], ...]
    finishes: tuple[Finish, ...]


class CallAdapter:
    """Serves the calls of one function that have the same argument names.

    Lifetime: it lives as long as the function, and holds no tensor.
    """

    def __init__(self, adapted: AdaptedFunction, names: tuple[str, ...]) -> None:
        self._adapted, self._function = adapted, adapted.function
        self._copies_out = "out" in names and "out" not in adapted.parameters
        settled = {"ver", "out"}
        self._lacking = [n for n in names if n not in settled and adapted.lacks(n)]
        self._has_version = "ver" in names
        self._traits = None if adapted.traits_of is None else adapted.traits_of(names)
        # A site sees few of them, and comparing takes less time than hashing.
        self._translations: list[tuple[Any, _Translation]] = []

    def __call__(self, arguments: Arguments) -> Any:
        """Call the function with ``arguments``, a dict that is used up by it."""
        out = arguments.pop("out") if self._copies_out else None
        translation = self._translation(arguments)
        for name in translation.dropped:
            del arguments[name]
        if translation.given:
            arguments.update(translation.given)
        for step in translation.steps:
            step(arguments)
        for name, own in translation.renamed:
            arguments[own] = arguments.pop(name)
        result = self._function(**arguments)
        for finish in translation.finishes:
            result = finish(result)
        return result if out is None else _into(out, result)

    def settling(
        self, arguments: Mapping[str, Any], first: tuple[str, ...], varying: tuple[str, ...]
    ) -> Settle:
        """Return what settles calls of the kind of this one; see :meth:`FA3Kernels.settling`."""
        anew = functools.partial(settled_anew, self, first, varying)
        call = dict(arguments)
        out = call.pop("out") if self._copies_out else None
        translation = self._translation(call)
        if out is not None or translation.finishes or not takes_by_position(self._function, first):
            return anew
        own = dict(translation.renamed)
        left_out = {*translation.dropped, *translation.given, *first, *varying}
        names = [(name, own.get(name, name)) for name in call if name not in left_out]
        given = {own.get(name, name): value for name, value in translation.given.items()}
        same = tuple(
            [(name, own.get(name, name)) for name in varying if name not in translation.dropped]
        )
        own_names = dict(names)
        act = functools.partial(_act, translation.steps)
        act_by_lengths = functools.partial(_act, translation.steps_by_lengths)

        def settle(arguments: Mapping[str, Any]) -> SettledCall:
            if act(arguments):
                # One that needs no change by its lengths need not be decided by itself any more.
                changed = act_by_lengths(arguments)
                return anew(arguments)._replace(
                    is_changed_by_steps=lambda call: act_by_lengths(call) != changed
                )
            keywords = {own_name: arguments[name] for name, own_name in names}
            return SettledCall(self._function, keywords | given, same, own_names, act_by_lengths)

        return settle

    def _translation(self, arguments: Arguments) -> _Translation:
        version = arguments["ver"] if self._has_version else 3
        unused = [_asks_for_nothing(arguments[n]) for n in self._lacking] if self._lacking else None
        traits = (version, unused, None if self._traits is None else self._traits(arguments))
        for known, translation in self._translations:
            if known == traits:
                return translation
        translation = self._settle(arguments)
        self._translations.append((traits, translation))
        return translation

    def _settle(self, arguments: Arguments) -> _Translation:
        """Work out how calls with the traits of this one are made."""
        adapted = self._adapted
        wanted = dict(arguments)
        _require_version_3(wanted.pop("ver", 3))
        for rule in adapted.rules:
            wanted = rule(wanted)
        for name in [name for name in wanted if adapted.lacks(name) and name != "out"]:
            if _asks_for_nothing(wanted[name]):
                del wanted[name]
            elif not adapted.takes_any:
                adapted.refuse(name)
        dropped = tuple(name for name in arguments if name not in wanted)
        given = {n: v for n, v in wanted.items() if n not in arguments or arguments[n] is not v}
        rules = [rule for rule in adapted.steps if rule.applies(wanted)]
        renamed = tuple((n, adapted.own_names[n]) for n in wanted if n in adapted.own_names)
        finishes = tuple(rule.finish for rule in adapted.finishes if rule.applies(wanted))
        return _Translation(
            dropped=dropped,
            given=given,
            steps=tuple(rule.step for rule in rules),
            steps_by_lengths=tuple(rule.step for rule in rules if not rule.by_layout),
            renamed=renamed,
            finishes=finishes,
        )


def _act(steps: tuple[Step, ...], arguments: Mapping[str, Any]) -> bool:
    """Tell whether any of these steps changes a call."""
    if not steps:
        return False
    call = dict(arguments)
    for step in steps:
        step(call)
    return len(call) != len(arguments) or any(call[n] is not v for n, v in arguments.items())


def _own_names(parameters: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """Return the function's own names for the arguments that it has under another name."""
    own = {}
    for names in _SYNONYMS:
        known = [name for name in names if name in parameters]
        own.update({name: known[0] for name in names if known and name not in parameters})
    return own


def _name(function: Any) -> str:
    """Name a function for messages; a partial one by the function that it calls."""
    function = getattr(function, "func", function)
    return f"{function.__module__}.{function.__name__}"


def _require_version_3(version: Any) -> None:
    if version != 3:
        raise UnsupportedKernelArgument(
            f"The call asks for FlashAttention {version} (ver={version}), and these kernels are "
            "FlashAttention-3. Start the server with --attention-backend fa3."
        )


def _asks_for_nothing(value: Any) -> bool:
    """Return whether an argument's value stands for "not used" in FA3's interfaces."""
    return value is None or value is False


def _into(out: torch.Tensor, result: Any) -> Any:
    """Write a result's output to ``out``, for a kernel that cannot write there itself."""
    if isinstance(result, tuple):
        return (_into(out, result[0]), *result[1:])
    return out.copy_(result.view(out.shape))


# --- steps ----------------------------------------------------------------------------------------


def _make_page_table_dense(arguments: Arguments) -> None:
    table = arguments["page_table"]
    if table is not None:
        arguments["page_table"] = table.contiguous()


DENSE_PAGE_TABLE = StepRule(
    lambda arguments: "page_table" in arguments, _make_page_table_dense, by_layout=True
)
"""For functions that read a page table as if its rows followed one another, as MATE does: the table
is copied where they do not; never the KV cache.
"""
