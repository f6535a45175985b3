"""How upstream's attention forwards change from release to release, and what the in-tree MUSA copy
of them lacks.

The in-tree MUSA backend of SGLang overrides ``forward_extend`` and ``forward_decode`` with copies.
This command compares both sides in each supported release, from sources alone: lines are those of
the parsed code, so that formatting, comments and docstrings do not count. It prints a table;
``--docs`` writes it as ``drift.md`` and, with matplotlib, draws ``drift.png``.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import os
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from sglang_musa_ext.upstream import SUPPORTED_RELEASES, SourceTree

UPSTREAM = ("sglang.srt.layers.attention.flashattention_backend", "FlashAttentionBackend")
IN_TREE = (
    "sglang.srt.hardware_backend.musa.attention.flashattention_backend",
    "MusaFlashAttentionBackend",
)
FORWARDS = ("forward_extend", "forward_decode")
READ_FROM = ("self", "layer", "forward_batch", "metadata")
"""What of these objects a forward reads says which features it knows."""


@dataclass(frozen=True)
class Forward:
    """One forward, reduced to what is compared."""

    lines: tuple[str, ...]
    parameters: frozenset[str]
    names: frozenset[str]

    @classmethod
    def of(cls, tree: SourceTree, owner: tuple[str, str], name: str) -> Forward:
        """Read the forward ``name`` of the class ``owner``."""
        node = tree.definition(owner[0], f"{owner[1]}.{name}")
        assert isinstance(node, ast.FunctionDef)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return cls(
            tuple(line.strip() for line in ast.unparse(node).splitlines()),
            frozenset(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)),
            frozenset(_names(node)),
        )


def _names(node: ast.AST) -> set[str]:
    """The functions that ``node`` calls, and what it reads from the objects of :data:`READ_FROM`."""
    found = set()
    for item in ast.walk(node):
        if isinstance(item, ast.Call) and isinstance(item.func, ast.Name):
            if not hasattr(builtins, item.func.id):
                found.add(f"{item.func.id}()")
        elif (
            isinstance(item, ast.Attribute)
            and isinstance(item.value, ast.Name)
            and item.value.id in READ_FROM
        ):
            found.add(f"{item.value.id}.{item.attr}")
    return found


@dataclass(frozen=True)
class Drift:
    """What one forward of one release looks like beside the last release's and beside the in-tree
    copy.
    """

    changed: int
    """Lines added plus lines removed since the last release; 0 for the first."""
    similarity: float
    """Of the in-tree copy to upstream's forward: 1 is equal, 0 is nothing in common."""
    missing: frozenset[str]
    """Parameters of upstream's forward, and names in it, that the in-tree copy does not have."""


def compare(upstream: Forward, copy: Forward, last: Forward | None) -> Drift:
    """Compare a release's forward with its in-tree copy and with the ``last`` release's forward."""
    parameters = {f"{name}=" for name in upstream.parameters - copy.parameters}
    return Drift(
        0 if last is None else changed_lines(last.lines, upstream.lines),
        SequenceMatcher(None, upstream.lines, copy.lines, autojunk=False).ratio(),
        frozenset(parameters | (upstream.names - copy.names)),
    )


def changed_lines(before: tuple[str, ...], after: tuple[str, ...]) -> int:
    """How many lines a diff would add and remove."""
    blocks = SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    return len(before) + len(after) - 2 * sum(block.size for block in blocks)


def measure(sources: Path) -> dict[str, dict[str, Drift]]:
    """Version -> forward -> drift, for the supported releases, oldest first."""
    table: dict[str, dict[str, Drift]] = {}
    last: dict[str, Forward] = {}
    for release in SUPPORTED_RELEASES:
        root = sources / release.version
        if not (root / "sglang").is_dir():
            sys.exit(
                f"scripts/drift: {root} has no sglang. Unpack the wheel of SGLang "
                f"{release.version} there."
            )
        tree = SourceTree(root)
        forwards = {name: Forward.of(tree, UPSTREAM, name) for name in FORWARDS}
        copies = {name: Forward.of(tree, IN_TREE, name) for name in FORWARDS}
        table[release.version] = {
            name: compare(forwards[name], copies[name], last.get(name)) for name in FORWARDS
        }
        last = forwards
    return table


def markdown(table: dict[str, dict[str, Drift]]) -> str:
    """The table, and what each release adds to what the copies lack."""
    lines = [
        (
            "| SGLang | lines changed: extend | decode | similarity of the copy: extend | decode | "
            "names the copy lacks |"
        ),
        "|---|---|---|---|---|---|",
    ]
    known: set[str] = set()
    news = []
    for version, drifts in table.items():
        extend, decode = (drifts[name] for name in FORWARDS)
        missing = extend.missing | decode.missing
        changed = [str(drift.changed) if known else "-" for drift in (extend, decode)]
        cells = (
            version,
            *changed,
            f"{extend.similarity:.2f}",
            f"{decode.similarity:.2f}",
            str(len(missing)),
        )
        lines.append(f"| {' | '.join(cells)} |")
        if missing - known:
            news.append(
                f"* {version}: " + ", ".join(f"`{name}`" for name in sorted(missing - known))
            )
        known |= missing
    return "\n".join([*lines, "", "Lacking from this release on:", "", *news])


def draw(table: dict[str, dict[str, Drift]], path: Path) -> None:
    """Draw similarity and missing names over the releases."""
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        sys.exit(
            "scripts/drift: the plot needs matplotlib, which is not installed. Run: pip install "
            "matplotlib"
        )
    pyplot.switch_backend("agg")
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(9, 6), height_ratios=(3, 2)
    )
    versions = list(table)
    for name, marker in zip(FORWARDS, "os", strict=True):
        above.plot(
            versions,
            [table[version][name].similarity for version in versions],
            marker=marker,
            label=name,
        )
    above.set(
        ylim=(0, 1),
        ylabel="similarity to upstream",
        title="The in-tree MUSA copies of upstream's forwards",
    )
    above.axhline(1, linestyle="--", color="grey", linewidth=1)
    above.grid(axis="y", alpha=0.3)
    above.legend(loc="lower left")
    counts = [
        len(frozenset().union(*(drift.missing for drift in table[version].values())))
        for version in versions
    ]
    bars = below.bar(versions, counts, color="tab:red", alpha=0.7)
    below.bar_label(bars)
    below.set(
        ylabel="parameters and names\nthe copies lack",
        xlabel="SGLang release",
        ylim=(0, max(counts) * 1.2),
    )
    below.tick_params(axis="x", rotation=45)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Print the table; write it and the plot where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = os.environ.get("SGLANG_RELEASES")
    parser.add_argument(
        "sources",
        type=Path,
        nargs="?" if sources else None,
        default=Path(sources) if sources else None,
        help="the directory that holds <version>/sglang for each release (default: SGLANG_RELEASES)",
    )
    parser.add_argument(
        "--docs", type=Path, help="write drift.md and drift.png into this directory"
    )
    options = parser.parse_args()
    table = measure(options.sources)
    text = markdown(table)
    print(text)
    if options.docs is not None:
        options.docs.mkdir(parents=True, exist_ok=True)
        draw(table, options.docs / "drift.png")
        (options.docs / "drift.md").write_text(f"{INTRODUCTION}\n{text}\n")


INTRODUCTION = """# Why compose: the drift of copied forwards

SGLang's in-tree MUSA backend carries copies of upstream's `forward_extend` and `forward_decode`. This page, written
by `scripts/drift`, compares the two in each release. Lines changed are lines added and removed since the release
before, of the parsed code, without comments and formatting. Similarity is that of Python's `difflib`: 1 is equal.
What a copy lacks are parameters of upstream's forwards (`name=`), functions they call, and what they read from the
backend, the layer, the batch and the metadata; each is a change of upstream's that the copy does not follow, unless
it does the same under another name.

![Similarity of the copies to upstream, and what they lack, by release](drift.png)
"""

if __name__ == "__main__":
    main()
