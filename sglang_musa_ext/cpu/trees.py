"""Draft trees of speculative decoding in PyTorch, by SGLang's names in ``sgl_kernel``.

A request's draft is a tree of ``n`` nodes. Node 0 is the last token that the target model chose;
every other node is a drafted token below its parent, which has a smaller number. SGLang passes
trees as links: to the first child and to the next sibling of each node, ``-1`` where there is none.
All results are written in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "build_tree_kernel_efficient",
    "reconstruct_indices_from_tree_mask",
    "verify_tree_greedy",
]

FULL_MASK, MASK_OF_DRAFT = 0, 1
"""Layouts of a tree mask, as upstream's ``TreeMaskMode`` numbers them; its third packs bits."""


def build_tree_kernel_efficient(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int = FULL_MASK,
) -> None:
    """Write the tree of the tokens that a draft model's beam search selected.

    The search numbers its candidates: group ``g`` holds ``g * topk`` to ``g * topk + topk - 1``.
    Those of group 0 are below the root, those of another group below candidate
    ``parent_list[:, g]``.

    Args:
        parent_list: ``(batch, groups)`` int64; entry 0 is not read, and ``depth`` 1 may leave none
            at all.
        selected_index: ``(batch, n - 1)`` int64, the candidates that became nodes 1 to n - 1,
            ascending.
        verified_seq_len: ``(batch,)``, tokens before the root.
        tree_mask: bool, flat, written: for each request and node, who is attended to. With
            ``FULL_MASK`` a row holds the request's verified tokens, which are left as they are, and
            then its ``n`` nodes; with ``MASK_OF_DRAFT`` the nodes alone. A node attends to the
            root, its ancestors and itself.
        positions: ``(batch * n,)`` int64, written: of each node in its sequence.
        retrive_index: ``(batch, n)`` int64, written: the number of each node in the whole batch.
        retrive_next_token: ``(batch, n)`` int64, filled with -1, written: each node's first child.
        retrive_next_sibling: ``(batch, n)`` int64, filled with -1, written: each node's next
            sibling.
        topk: candidates in a group.
        depth: of the search; not read, as ``parent_list`` tells it.
        draft_token_num: ``n``.
        tree_mask_mode: layout of ``tree_mask``.

    Raises:
        NotImplementedError: for a mask of packed bits.
    """
    if tree_mask_mode not in (FULL_MASK, MASK_OF_DRAFT):
        raise NotImplementedError(
            f"A tree mask of mode {int(tree_mask_mode)} was asked for, and the CPU reference "
            f"platform writes modes {FULL_MASK} and {MASK_OF_DRAFT}. Serve with "
            "--attention-backend fa3, which asks for those."
        )
    n, start = draft_token_num, 0
    for request, verified in enumerate(verified_seq_len.tolist()):
        parents = _parents(selected_index[request].tolist(), parent_list[request].tolist(), topk)
        prefix = verified if tree_mask_mode == FULL_MASK else 0
        size = n * (prefix + n)
        seen = _attended(parents)
        tree_mask[start : start + size].view(n, prefix + n)[:, prefix:] = seen.to(tree_mask.dtype)
        start += size
        # The root is attended to by everybody, itself included: what remains are the steps from it.
        positions[request * n : (request + 1) * n] = verified + seen.sum(1) - 1
        _write_links(parents, request, retrive_index, retrive_next_token, retrive_next_sibling)


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Write positions and links of trees that are known by their masks, as n-gram drafts are.

    Args:
        tree_mask: flat bool of ``(batch, n, n)``: whether a node (row) attends to another.
        verified_seq_len, positions, retrive_index, retrive_next_token, retrive_next_sibling: as for
            :func:`build_tree_kernel_efficient`, written whatever they held.
        batch_size: number of requests.
        draft_token_num: ``n``.
    """
    n = draft_token_num
    retrive_next_token.fill_(-1)
    retrive_next_sibling.fill_(-1)
    # A node's ancestors have smaller numbers, so the parent is the last of them.
    ancestors = tree_mask.reshape(batch_size, n, n).bool().tril(-1)
    positions.copy_((verified_seq_len[:, None] + ancestors.sum(-1)).flatten())
    numbered = torch.where(ancestors, torch.arange(n), -1)
    for request, parents in enumerate(numbered.amax(-1).tolist()):
        _write_links(parents, request, retrive_index, retrive_next_token, retrive_next_sibling)


def verify_tree_greedy(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Follow each tree from its root along the tokens that the target model would have chosen.

    Args:
        predicts: ``(batch * n,)`` or longer, int32, written where the way leads: the target's
            choice there.
        accept_index: ``(batch, most)`` int32, filled with -1, written: the numbers in the batch of
            the accepted nodes, the root first. ``most`` limits the way.
        accept_token_num: ``(batch,)`` int32, written: accepted nodes without the root.
        candidates: ``(batch, n)``, the token of each node.
        retrive_index, retrive_next_token, retrive_next_sibling: ``(batch, n)`` int64, the trees'
        links.
        target_predict: ``(batch, n)``, the target model's choice after each node.
    """
    for request in range(candidates.shape[0]):
        way = _accepted(
            candidates[request].tolist(),
            target_predict[request].tolist(),
            retrive_next_token[request].tolist(),
            retrive_next_sibling[request].tolist(),
            accept_index.shape[1],
        )
        nodes = retrive_index[request, way]
        accept_index[request, : len(way)] = nodes.to(accept_index.dtype)
        accept_token_num[request] = len(way) - 1
        predicts[nodes] = target_predict[request, way].to(predicts.dtype)


def _parents(selected: Sequence[int], parent_list: Sequence[int], topk: int) -> list[int]:
    """Return each node's parent: a node, or -1 for the root and where no parent was selected."""
    node_of = {candidate: node for node, candidate in enumerate(selected, start=1)}
    groups = [candidate // topk for candidate in selected]
    return [-1, *(node_of.get(parent_list[group], -1) if group else 0 for group in groups)]


def _attended(parents: Sequence[int]) -> torch.Tensor:
    """Return ``(n, n)`` bool: whether a node (row) attends to another, as an ancestor or itself."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    seen[:, 0] = True
    for node, parent in enumerate(parents):
        # Parents come before their children, so a parent's row is complete.
        if parent > 0:
            seen[node] |= seen[parent]
    return seen


def _write_links(
    parents: Sequence[int],
    request: int,
    index: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
) -> None:
    """Write the links of one request's tree; a later child is a later sibling."""
    n = len(parents)
    index[request] = torch.arange(request * n, (request + 1) * n)
    last_child: dict[int, int] = {}
    for node, parent in enumerate(parents):
        if parent < 0:
            continue
        links, at = (
            (next_sibling, last_child[parent]) if parent in last_child else (first_child, parent)
        )
        links[request, at] = node
        last_child[parent] = node


def _accepted(
    tokens: Sequence[int],
    chosen: Sequence[int],
    first_child: Sequence[int],
    next_sibling: Sequence[int],
    most: int,
) -> list[int]:
    """Return the path from the root on which the target model chose every node."""
    way = [0]
    while len(way) < most:
        child = first_child[way[-1]]
        while child != -1 and tokens[child] != chosen[way[-1]]:
            child = next_sibling[child]
        if child == -1:
            break
        way.append(child)
    return way
