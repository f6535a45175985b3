"""Draft trees in PyTorch, against trees that are walked node by node."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from sglang_musa_ext.cpu import trees as cpu_trees

SHAPES = [(1, 3, 4), (2, 2, 4), (4, 3, 8), (3, 4, 16), (1, 1, 2)]
"""``topk``, ``depth`` and ``n``: a chain, small and wide trees, and a single draft."""


@dataclass(frozen=True)
class Tree:
    """Return each node's path of drafted choices from the root, node 0, whose own is empty."""

    paths: tuple[tuple[int, ...], ...]

    def children(self, node: int) -> list[int]:
        """In the order of their numbers."""
        return [
            other for other, path in enumerate(self.paths) if path and path[:-1] == self.paths[node]
        ]

    def sees(self, node: int, other: int) -> bool:
        """Return whether ``other`` is on the way from the root to ``node``."""
        path = self.paths[other]
        return self.paths[node][: len(path)] == path


@dataclass(frozen=True)
class Beam:
    """The result of a beam search: the requests' trees, and the numbers by which it names them."""

    trees: list[Tree]
    parent_list: torch.Tensor
    selected_index: torch.Tensor


def beam(topk: int, depth: int, n: int, requests: int, seed: int) -> Beam:
    """A random search that keeps ``topk`` candidates a step, and ``n - 1`` in the end."""
    choose = random.Random(seed)
    trees, parent_lists, selections = [], [], []
    for _ in range(requests):
        # Candidates in the order in which the search meets them; a group's are the children of one
        # that it kept.
        paths: list[tuple[int, ...]] = [(choice,) for choice in range(topk)]
        parents, kept = [-1], list(range(topk))
        for _ in range(depth - 1):
            first = len(paths)
            parents += kept
            paths += [(*paths[parent], choice) for parent in kept for choice in range(topk)]
            kept = sorted(choose.sample(range(first, len(paths)), topk))
        selected: list[int] = []
        while len(selected) < min(n - 1, len(paths)):
            below = [
                c
                for c in range(len(paths))
                if c not in selected and _has_parent(c, paths, selected)
            ]
            selected.append(choose.choice(below))
        selected.sort()
        trees.append(Tree(((), *(paths[candidate] for candidate in selected))))
        parent_lists.append(parents)
        selections.append(selected)
    return Beam(trees, torch.tensor(parent_lists), torch.tensor(selections))


def _has_parent(candidate: int, paths: list[tuple[int, ...]], selected: list[int]) -> bool:
    above = paths[candidate][:-1]
    return not above or above in [paths[other] for other in selected]


@dataclass(frozen=True)
class Links:
    """The tensors in which a tree is passed, as SGLang allocates them."""

    positions: torch.Tensor
    index: torch.Tensor
    first_child: torch.Tensor
    next_sibling: torch.Tensor

    @classmethod
    def empty(cls, requests: int, n: int) -> Links:
        positions = torch.full((requests * n,), -7)
        return cls(positions, *torch.full((3, requests, n), -1))

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.positions, self.index, self.first_child, self.next_sibling


def built(
    search: Beam, lengths: torch.Tensor, topk: int, depth: int, mask: torch.Tensor, mode: int
) -> Links:
    n = search.selected_index.shape[1] + 1
    links = Links.empty(len(search.trees), n)
    cpu_trees.build_tree_kernel_efficient(
        search.parent_list,
        search.selected_index,
        lengths,
        mask,
        *links.arguments(),
        topk,
        depth,
        n,
        mode,
    )
    return links


def assert_links_are(links: Links, trees: list[Tree], lengths: torch.Tensor) -> None:
    n = len(trees[0].paths)
    for request, tree in enumerate(trees):
        assert links.index[request].tolist() == [request * n + node for node in range(n)]
        depths = links.positions[request * n : (request + 1) * n] - lengths[request]
        assert depths.tolist() == [len(path) for path in tree.paths]
        for node in range(n):
            assert linked(links, request, node) == tree.children(node)


def linked(links: Links, request: int, node: int) -> list[int]:
    """The children of ``node`` that the links lead to."""
    children, child = [], int(links.first_child[request, node])
    while child != -1:
        children.append(child)
        child = int(links.next_sibling[request, child])
    return children


@pytest.mark.parametrize(("topk", "depth", "n"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_links_and_positions_are_those_of_the_search(
    topk: int, depth: int, n: int, seed: int
) -> None:
    """Each node's children are found in the order of their numbers; positions count steps."""
    search, lengths = beam(topk, depth, n, requests=3, seed=seed), torch.tensor([5, 0, 9])
    n = len(search.trees[0].paths)
    links = built(
        search,
        lengths,
        topk,
        depth,
        torch.ones(3 * n * n, dtype=torch.bool),
        cpu_trees.MASK_OF_DRAFT,
    )
    assert_links_are(links, search.trees, lengths)


@pytest.mark.parametrize("mode", [cpu_trees.FULL_MASK, cpu_trees.MASK_OF_DRAFT])
@pytest.mark.parametrize(("topk", "depth", "n"), SHAPES)
def test_the_mask_holds_the_way_to_each_node(topk: int, depth: int, n: int, mode: int) -> None:
    """A node attends to the root, to its ancestors and to itself, in either layout of the mask."""
    search, lengths = beam(topk, depth, n, requests=3, seed=1), torch.tensor([5, 0, 9])
    n = len(search.trees[0].paths)
    prefixes = lengths.tolist() if mode == cpu_trees.FULL_MASK else [0, 0, 0]
    expected = [
        other < 0 or tree.sees(node, other)
        for tree, prefix in zip(search.trees, prefixes, strict=True)
        for node in range(n)
        for other in range(-prefix, n)
    ]
    mask = torch.ones(len(expected), dtype=torch.bool)
    built(search, lengths, topk, depth, mask, mode)
    assert mask.tolist() == expected


def test_verified_tokens_are_left_in_the_mask() -> None:
    """Values that SGLang wrote about verified tokens stay as they are."""
    search = beam(2, 2, 4, requests=1, seed=0)
    mask = torch.zeros(4 * (3 + 4), dtype=torch.bool)
    built(search, torch.tensor([3]), 2, 2, mask, cpu_trees.FULL_MASK)
    assert not mask.view(4, 7)[:, :3].any()


def test_a_draft_of_one_step_has_no_parents() -> None:
    """SGLang passes an empty list of parents where the search took a single step."""
    links = Links.empty(1, 3)
    mask = torch.zeros(9, dtype=torch.bool)
    cpu_trees.build_tree_kernel_efficient(
        torch.empty(1, 0, dtype=torch.long),
        torch.tensor([[0, 2]]),
        torch.tensor([4]),
        mask,
        *links.arguments(),
        3,
        1,
        3,
        cpu_trees.MASK_OF_DRAFT,
    )
    assert_links_are(links, [Tree(((), (0,), (2,)))], torch.tensor([4]))


def test_a_packed_mask_is_refused() -> None:
    """A mask of bits is refused by name before anything is written."""
    with pytest.raises(NotImplementedError, match="mode 2"):
        built(
            beam(2, 2, 4, 1, 0), torch.tensor([3]), 2, 2, torch.ones(16, dtype=torch.bool), mode=2
        )


@pytest.mark.parametrize(("topk", "depth", "n"), SHAPES)
def test_links_follow_from_a_mask(topk: int, depth: int, n: int) -> None:
    """A tree's mask alone gives its links and positions, whatever the buffers held."""
    search, lengths = beam(topk, depth, n, requests=3, seed=2), torch.tensor([5, 0, 9])
    n = len(search.trees[0].paths)
    mask = torch.tensor(
        [tree.sees(i, j) for tree in search.trees for i in range(n) for j in range(n)]
    )
    links = Links(*(torch.full_like(tensor, 3) for tensor in Links.empty(3, n).arguments()))
    cpu_trees.reconstruct_indices_from_tree_mask(mask, lengths, *links.arguments(), 3, n)
    assert_links_are(links, search.trees, lengths)


Choice = Callable[[tuple[int, ...]], int]
"""Return what a target model generates after a path of choices."""


def arbitrary_choice(topk: int, seed: str, path: tuple[int, ...]) -> int:
    """One of ``topk``, always the same one for a path."""
    return random.Random(f"{seed} {path}").randrange(topk)


@dataclass(frozen=True)
class Verified:
    """The outputs of ``verify_tree_greedy`` for one batch."""

    predicts: torch.Tensor
    accepted: torch.Tensor
    count: torch.Tensor


def verify(trees: list[Tree], choices: list[Choice], most: int) -> Verified:
    """Verify ``trees`` of paths' last choices, against a target that chooses by path."""
    n = len(trees[0].paths)
    links = Links.empty(len(trees), n)
    pairs = list(itertools.product(range(n), repeat=2))
    mask = torch.tensor([tree.sees(*pair) for tree in trees for pair in pairs])
    cpu_trees.reconstruct_indices_from_tree_mask(
        mask, torch.zeros(len(trees), dtype=torch.long), *links.arguments(), len(trees), n
    )
    candidates, targets = [], []
    for tree, choose in zip(trees, choices, strict=True):
        candidates.append([path[-1] if path else 99 for path in tree.paths])
        targets.append([choose(path) for path in tree.paths])
    result = Verified(
        torch.full((len(trees) * n + 1,), -9, dtype=torch.int32),
        torch.full((len(trees), most), -1, dtype=torch.int32),
        torch.full((len(trees),), -9, dtype=torch.int32),
    )
    cpu_trees.verify_tree_greedy(
        predicts=result.predicts,
        accept_index=result.accepted,
        accept_token_num=result.count,
        candidates=torch.tensor(candidates),
        retrive_index=links.index,
        retrive_next_token=links.first_child,
        retrive_next_sibling=links.next_sibling,
        target_predict=torch.tensor(targets),
    )
    return result


@pytest.mark.parametrize("most", [2, 5])
@pytest.mark.parametrize(("topk", "depth", "n"), SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_the_longest_way_of_the_target_is_accepted(
    topk: int, depth: int, n: int, most: int, seed: int
) -> None:
    """The accepted path is the longest that the target would generate, up to the limit."""
    trees = beam(topk, depth, n, requests=3, seed=seed).trees
    choices: list[Choice] = [
        partial(arbitrary_choice, topk, f"{seed} {request}") for request in range(len(trees))
    ]
    result = verify(trees, choices, most)
    for request, (tree, choose) in enumerate(zip(trees, choices, strict=True)):
        generated: tuple[int, ...] = ()
        way = [0]
        while len(way) < most and (*generated, choose(generated)) in tree.paths:
            generated = (*generated, choose(generated))
            way.append(tree.paths.index(generated))
        n = len(tree.paths)
        assert result.count[request] == len(way) - 1
        assert result.accepted[request].tolist() == [request * n + node for node in way] + [-1] * (
            most - len(way)
        )
        chosen = [choose(tree.paths[node]) for node in way]
        assert [int(result.predicts[request * n + node]) for node in way] == chosen


def test_nothing_is_predicted_off_the_way() -> None:
    """Predictions of rejected nodes stay: SGLang reads them through accepted nodes alone."""
    tree = Tree(((), (0,), (1,), (1, 0)))
    result = verify([tree], [lambda path: 1], most=4)
    assert result.predicts.tolist() == [1, -9, 1, -9, -9]
