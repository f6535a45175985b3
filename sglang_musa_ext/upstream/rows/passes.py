"""When a pass begins: upstream's methods that prepare metadata for a forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_musa_ext.upstream.names import FLASH_ATTENTION
from sglang_musa_ext.upstream.requirement import Requirement
from sglang_musa_ext.upstream.rows.backend import BASE, NEVER

_ANOTHER_METHOD = "Upstream prepares graphs through another method."
_OLD_GRAPHS = "The oldest supported release is 0.5.13 or newer."


@dataclass(frozen=True)
class PassMethod:
    """A method of upstream's backend whose call begins a new pass."""

    name: str
    why: str
    remove_when: str
    since: str | None = None
    until: str | None = None
    parameters: tuple[str, ...] | None = None
    """Its first parameters after ``self``; ``None``: nothing of it is relied on but its name."""
    assigns: bool = True
    """True if ``forward_metadata`` is assigned through it."""
    is_inherited: bool = False
    """True if it is a method of the class that all backends derive from."""

    def rows(self) -> list[Requirement]:
        """Return what the contract says about it."""
        rows = []
        bounds = (self.since, self.until)
        if self.assigns:
            owner, names = "FlashAttentionBackend", (self.name,)
            rows.append(self._row("metadata_writers", FLASH_ATTENTION, owner, names, *bounds))
        if self.parameters is not None:
            owner = "AttentionBackend" if self.is_inherited else "FlashAttentionBackend"
            module = BASE if self.is_inherited else FLASH_ATTENTION
            parameters = ("self", *self.parameters)
            rows.append(self._row("method", module, f"{owner}.{self.name}", parameters, *bounds))
        return rows

    def _row(
        self,
        kind: str,
        module: str,
        name: str,
        parameters: tuple[str, ...],
        since: str | None,
        until: str | None,
    ) -> Requirement:
        reason, end = self.why, self.remove_when
        return Requirement(
            kind, module, name, parameters, since, until, why=reason, remove_when=end
        )


_METHODS = (
    PassMethod(
        "init_forward_metadata",
        "Its call begins a new pass.",
        NEVER,
        parameters=("forward_batch",),
    ),
    PassMethod(
        "init_forward_metadata_capture_cuda_graph",
        "Up to 0.5.12 graphs are captured through it.",
        _OLD_GRAPHS,
        until="0.5.12.post1",
    ),
    PassMethod(
        "init_forward_metadata_replay_cuda_graph",
        "Up to 0.5.12 graphs are replayed through it.",
        _OLD_GRAPHS,
        until="0.5.12.post1",
    ),
    PassMethod(
        "init_forward_metadata_out_graph",
        "It prepares both capture and replay, and says whether a graph is being captured.",
        _ANOTHER_METHOD,
        since="0.5.13",
        parameters=("forward_batch", "in_capture"),
    ),
    PassMethod(
        "init_forward_metadata_in_graph",
        "It rewrites metadata in place inside a graph: a new pass although no object changes.",
        "Upstream no longer writes metadata inside graphs.",
        since="0.5.16",
        parameters=("forward_batch",),
        assigns=False,
    ),
    PassMethod(
        "stage_draft_extend_metadata",
        "It prepares draft-extend metadata ahead of a graph.",
        "Upstream no longer stages draft-extend metadata.",
        since="0.5.20",
    ),
    PassMethod(
        "on_after_cuda_graph_warmup",
        (
            "Called between a graph's warm-up runs and its capture: what the warm-up planned must "
            "not leak in."
        ),
        "Upstream no longer announces the end of the warm-up.",
        since="0.5.12.post1",
        parameters=(),
        assigns=False,
        is_inherited=True,
    ),
    *(
        PassMethod(
            name,
            "It prepares metadata for a graph.",
            _ANOTHER_METHOD,
            since=since,
            parameters=(parameter,),
            assigns=False,
            is_inherited=True,
        )
        for name, parameter, since in (
            (
                "init_forward_metadata_for_breakable_cuda_graph_capture",
                "forward_batch",
                "0.5.13",
            ),
            (
                "prepare_forward_metadata_for_breakable_cuda_graph_replay",
                "capture_metadata",
                "0.5.13",
            ),
            ("prepare_full_cuda_graph_chunked_prefix", "forward_batch", "0.5.17"),
        )
    ),
)

PASS_METHODS = tuple(method.name for method in _METHODS)
"""The methods that the mixin wraps where they exist: none of a pass's plans outlives a call."""

ROWS = tuple(row for method in _METHODS for row in method.rows())
