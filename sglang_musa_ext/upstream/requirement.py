"""One row of the contract.

There are two families of rows. A *need* says that a symbol must be there, with the parameters
relied on. An *allowance* says what a part of upstream may do, because this package knows how to
follow it there; the rows of one symbol add up, and whatever upstream does beyond them is a
violation. A row holds from ``since`` to ``until``, both included. Outside these bounds a need is
absent and an allowance unused, which the tests verify over all releases: a row that can go cannot
stay unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_musa_ext.upstream.releases import version_key

NONE_KNOWN = "none known"
"""The :attr:`Requirement.fault` of a fault that nobody seems to have reported to SGLang."""


@dataclass(frozen=True)
class Requirement:
    """Something of SGLang that this package relies on.

    What ``parameters`` means is said by the check of its ``kind``.
    """

    kind: str
    module: str
    name: str
    parameters: tuple[str, ...] = ()
    since: str | None = None
    """The first release in which the row holds; ``None``: the oldest supported."""
    until: str | None = None
    """The last release in which the row holds; ``None``: still."""
    used_by: str = field(kw_only=True, default="attention")
    """The module or folder of this package that touches the symbol."""
    why: str = field(kw_only=True)
    remove_when: str = field(kw_only=True)
    fault: str | None = field(kw_only=True, default=None)
    """The issue or pull request that a fault of upstream's belongs to, as ``owner/name#number``, or
    :data:`NONE_KNOWN`; ``None``: the row stands for no fault.
    """

    @property
    def symbol(self) -> str:
        """The dotted path of what the row is about."""
        return f"{self.module}.{self.name}" if self.name else self.module

    def holds_in(self, version: str) -> bool:
        """Tell whether ``version`` lies between ``since`` and ``until``."""
        key = version_key(version)
        if self.since is not None and key < version_key(self.since):
            return False
        return self.until is None or key <= version_key(self.until)
