"""Break the core in many small ways, one at a time; the backend-level tests must notice each.

Every mutant is a copy of the package with one piece of text replaced: a field or tensor left out of
a plan's key, a rule of what a pass is, an isolation between backends, threads or roles. The tests
named beside it guard that piece; they run against the copy, and one of them must fail. SGLang is
imported once, and each mutant tested in a fork.

Exit status: 0 if the tests noticed every mutant, 1 if one survived, 2 if the run itself is broken:
a text that is no longer in the source, guards that do not exist, or guards that fail without any
mutation.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[3]
PACKAGE, TESTS = "sglang_musa_ext", "tests"
FILES = (
    "attention/test_known_calls.py",
    *("attention/test_calls.py", "attention/test_checks.py", "attention/test_dispatch.py"),
    *("attention/test_graphs.py", "attention/test_kinds.py", "attention/test_lifetime.py"),
    *("attention/test_passes.py", "attention/test_raw_keys.py", "attention/test_selection.py"),
    "attention/test_speculation.py",
)
UNIT = ("attention/test_plans.py", "attention/test_workspace.py")
"""Tests of guards that no call of upstream reaches, or that are guarded twice."""
SECONDS = 150
"""Seconds that the guards of a mutant may take; one that hangs them is noticed."""

CALLS_FILE, RAW, DISPATCH, SELECT, SPACE = (
    "attention/calls.py",
    "attention/raw_keys.py",
    "attention/dispatch.py",
    "attention/selection.py",
    "attention/workspace.py",
)
CACHE, BACKEND, KERNELS, PLUGIN = (
    "attention/plans.py",
    "attention/mixin.py",
    "kernels/adapter.py",
    "plugin.py",
)


@dataclass(frozen=True)
class Mutant:
    """A break of the package: ``old`` becomes ``new``, and ``guards`` (``-k``) must fail."""

    name: str
    file: str
    old: str
    new: str
    guards: str
    tests: tuple[str, ...] = FILES


KEY = "return PlanKey(geometry, tuple(identities))"
FIELD_GUARDS = {
    "batch_size": "another_geometry",
    "device": "another_geometry",
    "has_softcap": "another_geometry",
}
"""Fields that a call cannot change alone, as tensors in the key change too: guarded as units."""
FIELDS = (
    "batch_size",
    "max_seqlen_q",
    "max_seqlen_k",
    "num_heads_q",
    "num_heads_kv",
    "headdim",
    "headdim_v",
    "qkv_dtype",
    "page_size",
    "has_softcap",
    "has_qv",
    "device",
    "options",
)
IDENTITIES = "for name, tensor in tensors.items()]"
TENSORS = ("cache_seqlens", "cu_seqlens_q", "cache_leftpad", "cu_seqlens_k_new")


def key_mutants() -> Iterator[Mutant]:
    """Leave out of the key each field and tensor, and of a tensor's identity each part."""
    for field in FIELDS:
        guards = FIELD_GUARDS.get(field, "differ_in_one_thing")
        tests = UNIT if field in FIELD_GUARDS else FILES
        yield Mutant(
            f"key without {field}",
            CACHE,
            KEY,
            KEY.replace("geometry,", f"geometry._replace({field}=None),"),
            guards,
            tests,
        )
    for name in TENSORS:
        less = IDENTITIES.replace("]", f' if name != "{name}"]')
        yield Mutant(f"key without {name}", CACHE, IDENTITIES, less, "differ_in_one_thing")
    for part, old, new, guards in (
        ("address", "tensor.data_ptr() or id(tensor)", "0", "differ_in_one_thing"),
        ("shape", "tensor.shape, tensor.stride()", "(), tensor.stride()", "another_view"),
        ("stride", "tensor.shape, tensor.stride()", "tensor.shape, ()", "told_apart"),
        ("version", "-1 if tensor.is_inference() else tensor._version", "-1", "told_apart"),
    ):
        yield Mutant(
            f"identity without {part}", CACHE, old, new, guards, UNIT if part == "shape" else FILES
        )
    yield Mutant(
        "planned tensors not kept alive",
        CACHE,
        "return _Plan(key, value, tensors)",
        "return _Plan(key, value, ())",
        "outlive_their_owner",
        UNIT,
    )


SIGNATURE = (
    "and q.shape == self.q_shape",
    "and max_seqlen_q == self.max_seqlen_q",
    "and (page_table is self.page_table or self._takes_table(page_table))",
    "and (own_keys is self._own_facts or self._has_own_keys(own_keys))",
    "and (options == self.options or self._has_options(options))",
    "and k_cache.shape == self.k_shape",
    "and v_cache.shape == self.v_shape",
    "and q.dtype is self.q_dtype",
    "and k_cache.dtype is self.k_dtype",
    "and v_cache.dtype is self.v_dtype",
    "and q.device == self._q_device",
    "and (k_cache.is_contiguous() or k_cache.stride()) == self.k_dense",
    "and (v_cache.is_contiguous() or v_cache.stride()) == self.v_dense",
    "and (self._versions is None or self._has_versions(cache_seqlens, cu_seqlens_q))",
)
"""The values that a known call over a cache is compared by."""
RAW_SIGNATURE = (
    "and self.max_seqlen_q == max_seqlen_q",
    "and (self.options == options or self._has_options(options))",
    "and self.q_shape == q.shape",
    "and self.k_shape == k.shape",
    "and self.v_shape == v.shape",
    "and self.q_dtype is q.dtype",
    "and self.k_dtype is k.dtype is k_cache.dtype",
    "and self.v_dtype is v.dtype is v_cache.dtype",
    "and self.k_dense == (k.is_contiguous() or k.stride())",
    "and self.v_dense == (v.is_contiguous() or v.stride())",
)
"""The values that a known call over raw keys is compared by."""
VARLEN_SIGNATURE = (
    "and cu_seqlens_k is self._cu_seqlens_k",
    "and options == self._options",
    "and q.shape == self._q_shape",
    "and k.shape == self._k_shape",
    "and v.shape == self._v_shape",
    "and q.dtype is self._q_dtype",
    "and k.dtype is self._k_dtype",
    "and v.dtype is self._v_dtype",
    "and (q.is_contiguous() or q.stride()) == self._q_dense",
    "and (k.is_contiguous() or k.stride()) == self._k_dense",
    "and (v.is_contiguous() or v.stride()) == self._v_dense",
)
"""The values that a known call of upstream's over raw keys is compared by."""
CHANGED = (
    "as_if_it_were_the_first or differ_in_one_thing or told_apart or goes_raw_after or "
    "another_layout or another_kind"
)


def signature_mutants() -> Iterator[Mutant]:
    """Each part left out of what tells calls apart before their geometry is worked out."""
    for part in (*SIGNATURE, *RAW_SIGNATURE, *VARLEN_SIGNATURE):
        yield Mutant(f"known calls without {part[4:]}", CALLS_FILE, part, "", CHANGED)
    for name in ("cache_seqlens", "cu_seqlens_q"):
        for old in (f"{name} is self.{name}\n", f"self.{name} is {name}\n"):
            yield Mutant(f"known calls with any {name}", CALLS_FILE, old, "True\n", CHANGED)
    for name in ("k", "v"):
        old = f" is {name}.dtype is {name}_cache.dtype"
        new = f" is {name}.dtype"
        yield Mutant(f"raw calls whatever the dtype of {name}_cache", CALLS_FILE, old, new, CHANGED)
    for name, old, new in (
        ("offsets of queries", "cu_seqlens_q is self._cu_seqlens_q\n", "True\n"),
        ("plain options", "if self._others_of(options) != self._others:", "if False:"),
        ("layout of a tensor", " or _layout(value) != layout:", ":"),
        ("lack of a tensor", "not isinstance(value, torch.Tensor) or ", ""),
    ):
        yield Mutant(f"known calls with any {name}", CALLS_FILE, old, new, CHANGED)
    yield Mutant(
        "varlen calls with other arguments", DISPATCH, "not (args or others)", "not args", CHANGED
    )
    yield Mutant(
        "varlen calls of a pass that is over",
        CACHE,
        "        # What ends a pass lets go of it.\n        self._ended = False\n",
        "",
        "varlen_calls_alone",
    )
    yield Mutant(
        "varlen calls without an end",
        CACHE,
        "return len(self.current.known_varlen) < _MOST_VARLEN",
        "return True",
        "chunks_of_a_prefix",
    )
    for name, old, new, guards in (
        (
            "length facts",
            "if _length_facts(cu_seqlens_q, cu_seqlens_k) != self._length_facts:",
            "if False:",
            "first_varlen_call",
        ),
        (
            "steps",
            "if not self._settled.is_changed_by_steps(call):",
            "if True:",
            "first_varlen_call",
        ),
        (
            "keywords",
            "self.keywords[own] = call[name]\n",
            "pass\n",
            "first_varlen_call",
        ),
        (
            "names",
            "if not all(name in arguments for name in VARLEN_OPTIONS[:2]):",
            "if False:",
            "first_varlen_call",
        ),
    ):
        yield Mutant(
            f"varlen calls of another pass whatever their {name}", CALLS_FILE, old, new, guards
        )
    yield Mutant(
        "calls decided one by one for ever",
        KERNELS,
        "is_changed_by_steps=lambda call: act_by_lengths(call) != changed",
        "is_changed_by_steps=lambda call: False",
        "decided_once",
    )
    yield Mutant(
        "known varlen calls are not counted",
        CACHE,
        "calls += varlen.uses",
        "calls += 0",
        "known_and_counted",
    )
    yield Mutant(
        "varlen calls are known where each is looked at",
        BACKEND,
        "self._remembers and self._sampler is None and ",
        "",
        "every_call_is_looked_at",
    )
    yield Mutant("known calls with other arguments", DISPATCH, ") and not others:", "):", CHANGED)
    yield Mutant(
        "calls of any names are of one kind",
        CALLS_FILE,
        'return "max_seqlen_q" in arguments and _UPSTREAMS.issuperset(arguments)',
        'return "max_seqlen_q" in arguments',
        CHANGED,
    )


PLANNED = "return self._kernels.plans_unequal_queries or has_equal_queries(arguments)"
ALONE = 'self._settings.plans != "always" and self._kernels.plans_for_itself'
PASS_RULES = (
    Mutant(
        "end_pass does nothing",
        CACHE,
        "        if self._ended:\n            return\n",
        "        return\n",
        "rewritten_in_place or init_method or outside",
    ),
    Mutant(
        "init methods end no pass",
        BACKEND,
        "        self._plans.end_pass()\n        return getattr(super",
        "        return getattr(super",
        "rewritten_in_place or init_method",
    ),
    Mutant(
        "batch ignored", CACHE, "self._forward_batch() is not forward_batch", "False", "batch_alone"
    ),
    Mutant(
        "metadata object ignored",
        CACHE,
        "or self._forward_metadata is not forward_metadata",
        "",
        "metadata_object_alone",
    ),
    Mutant(
        "stream and capture ignored",
        CACHE,
        "or self._state != state",
        "",
        "capture or another_stream",
    ),
    Mutant(
        "stream ignored",
        CACHE,
        "or self._state != state",
        "or self._state[1] != state[1]",
        "another_stream",
    ),
    Mutant(
        "capture state ignored",
        CACHE,
        "or self._state != state",
        "or self._state[0] != state[0]",
        "takes_no_plan_from_before or leaves_no_plan_behind",
    ),
    Mutant(
        "a layer may come again",
        CACHE,
        "if call in current.layers:",
        "if False:",
        "reuse_one_metadata_object or the_same_layer_object",
    ),
    Mutant(
        "role ignored",
        CACHE,
        "call = (id(layer), role) if role else id(layer)",
        "call = id(layer)",
        "cascade or context_parallel",
    ),
    Mutant(
        "role never counted",
        CACHE,
        "role = self.role = self.role + 1",
        "role = self.role = 0",
        "cascade or context_parallel",
    ),
    Mutant("unequal queries are planned", BACKEND, PLANNED, "return True", "unequal_queries"),
    Mutant(
        "unequal queries are never planned",
        BACKEND,
        PLANNED,
        "return has_equal_queries(arguments)",
        "plan_all",
    ),
    Mutant(
        "plans that nothing reuses are computed",
        BACKEND,
        " or self._plans.most_calls == 1):",
        "):",
        "nothing_reuses",
    ),
    Mutant(
        "kernels that plan nothing are left alone",
        BACKEND,
        ALONE,
        'self._settings.plans != "always"',
        "nothing_reuses",
    ),
    Mutant(
        "kernels that plan for themselves are planned for outside of graphs",
        BACKEND,
        "(not self._plans.capturing or self._plans.most_calls",
        "(self._plans.most_calls",
        "in_graphs_alone",
    ),
    Mutant(
        "plans for every call are not asked for",
        BACKEND,
        ALONE,
        "self._kernels.plans_for_itself",
        "in_graphs_alone",
    ),
    Mutant(
        "unsplit calls are planned",
        BACKEND,
        "unsplit = self._kernels.static_num_splits(**keywords) == 1",
        "return False",
        "not_split",
    ),
    Mutant(
        "unsplit calls are counted once a pass",
        CACHE,
        "elif known.unsplit:",
        "elif False:",
        "not_split",
    ),
    Mutant(
        "unknown splits are taken for one",
        BACKEND,
        "unsplit = self._kernels.static_num_splits(**keywords) == 1",
        "unsplit = self._kernels.static_num_splits(**keywords) in (1, None)",
        "not_split",
    ),
    Mutant(
        "unsplit calls are known in spite of the setting",
        BACKEND,
        'if self._settings.plans == "always" or not self._kernels.combines_unsplit:',
        "if not self._kernels.combines_unsplit:",
        "not_split",
    ),
    Mutant(
        "unsplit calls get no plan where it costs nothing",
        BACKEND,
        'if self._settings.plans == "always" or not self._kernels.combines_unsplit:',
        'if self._settings.plans == "always":',
        "not_split",
    ),
    Mutant(
        "one pass of one call is for ever",
        CACHE,
        "max(self.most_calls, len(self.current.layers))",
        "self.most_calls or len(self.current.layers)",
        "nothing_reuses",
    ),
    Mutant(
        "queries of one request make all equal",
        CALLS_FILE,
        '(cu_seqlens_q.size(0) - 1) * arguments["max_seqlen_q"]',
        'arguments["max_seqlen_q"]',
        "unequal_queries",
    ),
    Mutant(
        "layers known by their id",
        CACHE,
        "if call in current.layers:",
        "if any(x.layer_id == layer.layer_id for x in current.layers.values()):",
        "share_keys",
    ),
    Mutant(
        "plans survive their pass",
        CACHE,
        "        self.current = Pass(\n"
        "            _known_again(ended, current.earlier),\n"
        "            _known_again(current.known_varlen, current.earlier_varlen),\n"
        "        )\n",
        "        self.current.layers.clear()\n",
        "decode_of_uniform or takes_no_plan or reuse_one_metadata_object",
    ),
    Mutant(
        "a layer counts as nothing seen",
        CACHE,
        "        current.layers[call] = layer\n",
        "",
        "reuse_one_metadata_object",
    ),
    Mutant(
        "calls from outside join a pass",
        BACKEND,
        "        self._plans.begin_layer(None, self._OUTSIDE, None)\n",
        "",
        "outside_of_any_layer",
    ),
    Mutant(
        "nothing is ever reused",
        CACHE,
        "            if plan.key == key:\n",
        "            if False:\n",
        "nothing_remembered",
    ),
    Mutant(
        "nothing is ever recalled",
        DISPATCH,
        "for known in backend.begin_call():",
        "for known in backend.begin_call()[:0]:",
        "recalled_without_its_geometry",
    ),
    Mutant(
        "everything is recalled",
        DISPATCH,
        "if not args and known.matches(",
        "if known or known.matches(",
        "differ_in_one_thing",
    ),
    Mutant(
        "a call that takes no plan is not remembered",
        BACKEND,
        "        self._plans.remember(known, again",
        "        plan is None or self._plans.remember(known, again",
        "counted_once_a_pass",
    ),
    Mutant(
        "calls that take no plan count as reuses",
        CACHE,
        "elif known.plan is not None:",
        "elif not known.unsplit:",
        "unequal_queries",
    ),
    Mutant(
        "remembered plans survive their pass",
        CACHE,
        "        self.current.known.clear()\n",
        "",
        "forgotten",
        UNIT,
    ),
    Mutant(
        "checks see recalled plans as checked",
        BACKEND,
        'self._check == "off" and not',
        "True and not",
        "corrupted",
    ),
)

WORKSPACE = (
    Mutant(
        "in-place plans always reused",
        CACHE,
        "key, None, tensors)\n            return False",
        "key, None, tensors)\n            return True",
        "mla and decode",
    ),
    Mutant(
        "in-place plans never reused",
        CACHE,
        "if held is None or held.key != key:",
        "if True:",
        "checks_pass",
    ),
    Mutant(
        "in-place plans of any key reused",
        CACHE,
        "if held is None or held.key != key:",
        "if held is None:",
        "rewritten_in_place or alternating_geometries",
        FILES + UNIT,
    ),
    Mutant(
        "roles share a slot",
        BACKEND,
        "self._workspace.slot(self, role, size)",
        "self._workspace.slot(self, 0, size)",
        "cascade and mla",
    ),
    Mutant(
        "roles share a place and a slot's plan",
        BACKEND,
        "self._plans.plan_in_place(role,",
        "self._plans.plan_in_place(0,",
        "cascade and mla",
    ),
    Mutant(
        "backends share a slot",
        SPACE,
        "key = (id(owner), role)",
        "key = (0, role)",
        "mla and (threads or overlap)",
    ),
    Mutant(
        "slots of the dead stay taken",
        SPACE,
        "        while self._dead:",
        "        while False:",
        "dropped_backend",
    ),
    Mutant(
        "slots do not grow",
        SPACE,
        "slot is None or slot.size < size",
        "slot is None",
        "grows",
        UNIT,
    ),
    Mutant(
        "backends are kept alive",
        BACKEND,
        "weakref.WeakSet[MusaFA3Mixin] = weakref.WeakSet()",
        "set[MusaFA3Mixin] = set()",
        "frees_what_it_held",
    ),
    Mutant(
        "batches are kept alive",
        CACHE,
        "return weakref.ref(batch)",
        "return lambda: batch",
        "batch_is_not_kept",
        UNIT,
    ),
    Mutant(
        "one workspace for all devices",
        SPACE,
        "cls._by_device.get((device, capacity))",
        "next(iter(cls._by_device.values()), None)",
        "belongs_to_one_device",
    ),
)

CALLS = (
    Mutant(
        "cu_seqlens_k_new always passed on",
        BACKEND,
        'if arguments.get("k") is None:',
        "if False:",
        "counts_its_keys_twice",
    ),
    Mutant(
        "cu_seqlens_k_new never passed on",
        BACKEND,
        'if arguments.get("k") is None:',
        "if True:",
        "new_keys_keep",
    ),
    Mutant(
        "max_seqlen_k from the lengths",
        CALLS_FILE,
        'arguments["k_cache"].shape[1] * arguments["page_table"].shape[1],',
        'int(arguments["cache_seqlens"].max()),',
        "capacity_of_the_page_table or long_context",
    ),
    Mutant(
        "max_seqlen_k in pages",
        CALLS_FILE,
        'arguments["k_cache"].shape[1] * arguments["page_table"].shape[1],',
        'arguments["page_table"].shape[1],',
        "capacity_of_the_page_table or long_context",
    ),
    Mutant(
        "no plan reaches the kernel",
        BACKEND,
        'arguments["scheduler_metadata"] = again',
        'arguments["scheduler_metadata"] = None',
        "own_precompute or (decode_of_uniform and mla)",
    ),
    Mutant(
        "plans for no options",
        CALLS_FILE,
        "_option(get(name), none) for",
        "none for",
        "window_layers or read_off_the_call",
    ),
    Mutant(
        "plans for as many key heads as query heads",
        CALLS_FILE,
        "num_heads_kv=num_heads_kv,",
        "num_heads_kv=q.shape[-2],",
        "read_off_the_call",
    ),
    Mutant(
        "plans for values as wide as keys",
        CALLS_FILE,
        'headdim_v=arguments["v_cache"].shape[-1],',
        "headdim_v=q.shape[-1],",
        "read_off_the_call or value_head_dim",
    ),
    Mutant(
        "upstream's own plans stay on",
        BACKEND,
        "        self._get_scheduler_metadata = None\n",
        "",
        "own_precompute",
    ),
    Mutant(
        "out= is dropped",
        KERNELS,
        "return result if out is None else _into(out, result)",
        "return result",
        "output_buffer",
    ),
    Mutant(
        "force-update ignored",
        BACKEND,
        "if self._settings.force_update_metadata:",
        "if False:",
        "force_update",
    ),
)

ORIGINAL = (
    "\n            return original(*args, **arguments)\n"
    "        arguments.update(zip(parameters, args, strict=False))\n"
    "        return"
)
"""The end of both dispatchers."""
ISOLATION = (
    Mutant(
        "threads share what runs",
        DISPATCH,
        "class _RunningLayers(threading.local):",
        "class _RunningLayers:",
        "threads or another_thread",
    ),
    Mutant(
        "dispatcher never dispatches",
        DISPATCH,
        f"not running:{ORIGINAL} backend.call_unlike",
        f"True:{ORIGINAL} backend.call_unlike",
        "decode_of_uniform",
    ),
    Mutant(
        "dispatcher always dispatches",
        DISPATCH,
        f"not running:{ORIGINAL} backend.call_unlike",
        f"False:{ORIGINAL} backend.call_unlike",
        "other_users",
    ),
    Mutant(
        "dispatcher of raw keys always dispatches",
        DISPATCH,
        f"not running:{ORIGINAL} running[-1]",
        f"False:{ORIGINAL} running[-1]",
        "other_users",
    ),
    Mutant(
        "a layer stays on the stack",
        BACKEND,
        "            running.pop()\n\n    def flash_attn_with_kvcache",
        "            pass\n\n    def flash_attn_with_kvcache",
        "no_trace",
    ),
    Mutant(
        "dispatch is installed over itself",
        DISPATCH,
        "patching.wrap(upstream, name,",
        "patching.replace(\n            upstream, name, "
        "patching.mark(_dispatcher(name, getattr(upstream, name)), 0)) or (",
        "installing_twice",
    ),
)

CHECKS = (
    Mutant(
        "plans are not compared",
        BACKEND,
        "if reused and self._checking:",
        "if False:",
        "corrupted_plan",
    ),
    Mutant(
        "in-place plans are not compared",
        BACKEND,
        "if reuse and self._checking:",
        "if False:",
        "corrupted_plan",
    ),
    Mutant(
        "comparison during capture",
        BACKEND,
        'return self._check != "off" and not self._plans.capturing',
        'return self._check != "off"',
        "disturb_a_capture",
    ),
    Mutant(
        "comparison without being asked",
        BACKEND,
        'return self._check != "off" and not self._plans.capturing',
        "return not self._plans.capturing",
        "without_the_check",
    ),
    Mutant(
        "outputs are not compared",
        BACKEND,
        'if self._check == "output"',
        "if False",
        "wrong_output",
    ),
)

SELECTION = (
    Mutant(
        "draft steps are upstream's",
        SELECT,
        "        with upstream_builds_ours():\n            super().__init__",
        "        if True:\n            super().__init__",
        "multi_step_draft",
    ),
    Mutant(
        "registry left alone",
        PLUGIN,
        'patching.replace(ATTENTION_BACKENDS, "fa3", create)',
        "pass",
        "registry_builds",
    ),
    Mutant(
        "fa4 left alone",
        PLUGIN,
        'patching.replace(ATTENTION_BACKENDS, "fa4", _refuse_fa4)',
        "pass",
        "fa4_is_refused",
    ),
    Mutant(
        "draft factories left alone",
        PLUGIN,
        "patching.wrap(DraftBackendFactory, name, wrapper, again=True)",
        "pass",
        "draft_factories",
    ),
    Mutant(
        "in-tree MUSA classes left alone",
        SELECT,
        "stack.callback(patching.stand_in(IN_TREE_MODULE, in_tree))",
        "pass",
        "draft_factories",
    ),
    Mutant(
        "foreign backends pass",
        "guard.py",
        "if not any(cls.__module__.startswith(_OURS) for cls in type(self).__mro__):",
        "if False:",
        "foreign_fa3",
    ),
    Mutant("DFlash does not know us", SELECT, " | {MusaFA3Backend.__name__}", "", "dflash"),
)


RAW_KEYS = (
    Mutant(
        "raw with a prefix", RAW, "return None if any(prefixes) else", "return", "prefix_anywhere"
    ),
    Mutant(
        "raw in any mode",
        RAW,
        "forward_batch.forward_mode != ForwardMode.EXTEND or ",
        "",
        "a_verify_reads",
    ),
    Mutant("raw without prefixes on the host", RAW, "prefixes is None or ", "", "unknown_prefixes"),
    Mutant("raw without lengths on the host", RAW, " or lengths is None", "", "unknown_lengths"),
    Mutant(
        "raw for queries of others",
        RAW,
        'arguments.get("cu_seqlens_q") is metadata.cu_seqlens_q\n        and ',
        "",
        "other_lengths",
    ),
    Mutant(
        "raw for keys of others",
        RAW,
        '\n        and arguments.get("cache_seqlens") is metadata.cache_seqlens_int32',
        "",
        "other_lengths",
    ),
    Mutant(
        "raw with fixed splits",
        RAW,
        'if arguments.get("num_splits", 0) != 0:',
        "if False:",
        "deterministic",
    ),
    Mutant(
        "raw in spite of other arguments",
        RAW,
        "return all(arguments[name] is None",
        "return True or all(arguments[name] is None",
        "argument_that_only",
    ),
    Mutant(
        "raw whatever the kernels serve",
        RAW,
        "return kernels.serves_raw_keys(",
        "return True or kernels.serves_raw_keys(",
        "without_such_a_function",
    ),
    Mutant(
        "raw in another dtype",
        RAW,
        """dtypes != {arguments["k_cache"].dtype} or""",
        "",
        "another_dtype",
    ),
    Mutant(
        "raw in another dtype of values",
        RAW,
        """ or dtypes != {arguments["v_cache"].dtype}""",
        "",
        "another_dtype",
    ),
    Mutant("raw over padding", BACKEND, " == self._new_rows", "", "raw_keys_again"),
    Mutant(
        "raw over rows of any number",
        BACKEND,
        "rows = q.shape[0] == k.shape[0] == v.shape[0] == self._new_rows",
        "rows = True",
        "padded_rows",
    ),
    Mutant(
        "raw in captures",
        BACKEND,
        "return rows and not self._plans.capturing",
        "return rows",
        "a_capture_reads",
    ),
    Mutant(
        "raw over keys that are not written",
        BACKEND,
        " and k is not None and save_kv_cache",
        " and k is not None",
        "not_written",
    ),
    Mutant(
        "raw without keys",
        BACKEND,
        " and k is not None and save_kv_cache",
        " and save_kv_cache",
        "share_keys",
    ),
    Mutant(
        "queries are copied",
        RAW,
        "    return UncopiedQueries(q)",
        "    return q",
        "where_the_layer_has_them",
    ),
    Mutant("queries in heads are not copied", RAW, "q.ndim != 2 or ", "", "other_queries"),
    Mutant("queries with gaps are not copied", RAW, " or q.stride(1) != 1", "", "other_queries"),
    Mutant(
        "queries of the first call over the cache are not copied",
        BACKEND,
        'arguments["q"] = arguments["q"].contiguous()',
        "pass",
        "in_one_piece",
    ),
    Mutant(
        "queries of further calls over the cache are not copied",
        DISPATCH,
        "q = q.contiguous()",
        "pass",
        "in_one_piece",
    ),
    Mutant(
        "raw in MLA",
        BACKEND,
        "self._settings.raw_prefill and not self.use_mla",
        "self._settings.raw_prefill",
        "mla_reads",
    ),
    Mutant(
        "raw where it is off",
        BACKEND,
        "self._settings.raw_prefill and not",
        "not",
        "setting_turns_it_off",
    ),
)


MATE, RECORD = "kernels/mate.py", "kernels/record.py"
FP8_TESTS = ("attention/test_fp8.py",)
OF_MATE = [
    Mutant(
        "one request has all rows",
        MATE,
        "if (q.size(0), k.size(0)) != lengths or _is_capturing(q.device):",
        "if False:",
        "padded_rows",
        ("attention/test_passes.py",),
    ),
    Mutant(
        "scales for the server's requests",
        MATE,
        "scale = scale[:1] if is_of_layer else scale",
        "scale = scale",
        "chunked_local",
        FP8_TESTS,
    ),
    Mutant("fp8 without the scales it lacks", MATE, "for name in _SCALES:", "for name in ():",
        "chunked_local", FP8_TESTS,
    ),
    Mutant(
        "fp8 for any model",
        RECORD,
        "if kv_cache_dtype in FP8 and dtype not in (None, torch.bfloat16):",
        "if False:",
        "another_type",
        FP8_TESTS,
    ),
    Mutant(
        "fp8 with heads of any size",
        RECORD,
        "if dtype not in FP8 or headdim <= policy.LARGEST_FP8_HEAD_DIM:",
        "if True:",
        "casts_no_queries",
        FP8_TESTS,
    ),
    Mutant(
        "outputs of fp8 compared as exact ones",
        "attention/checks.py",
        "rounding = _FP8_ROUNDING.get(read)",
        "rounding = None",
        "rounded_probabilities",
        FP8_TESTS,
    ),
]  # fmt: skip
"""Mutants of MATE's own ways: with one request, and with a KV cache in fp8."""

FIRST_CALLS = [
    Mutant(
        "first calls over lengths of any type",
        CALLS_FILE,
        "if pass_facts(page_table, cache_seqlens, cu_seqlens_q) != self.site.pass_facts:",
        "if False:",
        "the_first_call",
    ),
    Mutant(
        "first calls with any heads", CALLS_FILE,
        "if max_seqlen_q is ABSENT or q.shape[1:] != self.q_shape[1:]:",
        "if max_seqlen_q is ABSENT:", "the_first_call",
    ),
    Mutant(
        "first calls without a longest query", CALLS_FILE,
        "if max_seqlen_q is ABSENT or q.shape", "if q.shape", "the_first_call",
    ),
    Mutant(
        "first calls of any kind", BACKEND,
        "if known.matches(q, k_cache, v_cache, *lengths, options, own_keys):", "if True:",
        "the_first_call",
    ),
    Mutant(
        "first calls whatever their step does", CALLS_FILE,
        "return None if self._settled.is_changed_by_steps(arguments) else arguments",
        "return arguments", "the_first_call_over_raw",
    ),
    Mutant(
        "first calls with arguments that nobody reads", DISPATCH, "None if others or args else",
        "None if args else", "the_first_call",
    ),
    Mutant(
        "first calls by position", DISPATCH, "None if others or args else", "None if others else",
        "by_position",
    ),
    Mutant("calls by position", DISPATCH, "if not args and known.matches(", "if known.matches(",
        "by_position",
    ),
    Mutant(
        "first calls without a plan", BACKEND, """arguments["scheduler_metadata"] = plan
        known.settle""", "known.settle", "the_first_call",
    ),
    Mutant("first calls over padding", BACKEND, "if not self._is_whole_batch(q) or not", "if not",
        "serve_no_pass",
    ),
    Mutant(
        "first calls over other lengths than the batch's", BACKEND,
        " or not attends_to_the_batch(lengths, self.forward_metadata):", ":",
        "the_first_call_over_raw",
    ),
    Mutant(
        "first calls read the cache again", BACKEND, "if self.own_keys is not None:\n            #",
        "if False:\n            #", "reads_raw_keys_again",
    ),
    Mutant(
        "first calls over as many raw keys as before", CALLS_FILE,
        "        self.k_shape, self.v_shape = rows + self.k_shape[1:], rows + self.v_shape[1:]\n",
        "", "only_the_first_pass",
    ),
    Mutant("a pass that is over keeps its tensors", CACHE,
        "        known.release()\n", "        pass\n", "holds_no_tensor",
    ),
    Mutant(
        "lengths of a call of another kind are kept", BACKEND,
        "            known.release()\n        return None", "        return None",
        "holds_no_tensor",
    ),
    Mutant("what is known keeps its arguments", CALLS_FILE,
        "        self.keywords.update(self._nothing)\n", "", "holds_no_tensor",
    ),
    Mutant("ever more calls of earlier passes", CACHE, "[:_MOST_EARLIER]", "",
        "few_calls_of_earlier or few_varlen_calls",
    ),
    Mutant("plans in slots of earlier passes", CACHE, " if known.in_place is None]", "]",
        "mla or latent",
    ),
    Mutant("a chosen first call is not compared", "attention/sampling.py",
        "self._plans.current.earlier.clear()", "pass", "compared or sampl or share",
        ("attention/test_sampling.py",),
    ),
]  # fmt: skip
"""Mutants of the first call of a pass, which is served as one of an earlier pass."""


def all_mutants() -> list[Mutant]:
    """Every mutant, in the order of the run."""
    return [
        *key_mutants(),
        *signature_mutants(),
        *PASS_RULES,
        *WORKSPACE,
        *CALLS,
        *ISOLATION,
        *CHECKS,
        *SELECTION,
        *RAW_KEYS,
        *OF_MATE,
        *FIRST_CALLS,
    ]


def selected(names: Sequence[str]) -> list[Mutant]:
    """Return the mutants with one of ``names`` in theirs; without any, all."""
    mutants = all_mutants()
    return [mutant for mutant in mutants if not names or _has_one(mutant, names)]


def _has_one(mutant: Mutant, names: Sequence[str]) -> bool:
    return any(name in mutant.name for name in names)


class BrokenRun(RuntimeError):
    """The run says nothing about the tests, because it cannot be made as written."""


def mutated(mutant: Mutant | None, into: Path) -> None:
    """Put package, tests and settings below ``into``, broken as ``mutant`` says."""
    for folder in (PACKAGE, TESTS):
        shutil.copytree(ROOT / folder, into / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", into)
    if mutant is None:
        return
    source = into / PACKAGE / mutant.file
    source.write_text(broken(mutant, source.read_text()))


def broken(mutant: Mutant, text: str) -> str:
    """Return the text of a file, broken as ``mutant`` says.

    Raises:
        BrokenRun: the mutant's own text is not there once, or what comes out is no Python, which
            every test would notice.
    """
    follow = "Follow the source in scripts/lib/mutants/__main__.py."
    if text.count(mutant.old) != 1:
        raise BrokenRun(
            f"mutant {mutant.name!r}: its text occurs {text.count(mutant.old)} times in "
            f"{mutant.file}, expected once. {follow} The text:\n{mutant.old}"
        )
    changed = text.replace(mutant.old, mutant.new)
    try:
        ast.parse(changed)
    except SyntaxError as error:
        reason = f"mutant {mutant.name!r} leaves no Python in {mutant.file}: {error}. {follow}"
        raise BrokenRun(reason) from error
    return changed


def start(mutant: Mutant | None, guards: str, tests: Sequence[str], folder: Path) -> int:
    """Run the guards against a copy in a forked process; returns its id."""
    mutated(mutant, folder)
    process = os.fork()
    if process:
        return process
    try:
        run_guards(guards, tests, folder)
    # A fork must not return into the stack of its parent, whatever happens.
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(3)


def run_guards(guards: str, tests: Sequence[str], folder: Path) -> NoReturn:
    """Become the process that tests the copy in ``folder``; its exit status is pytest's."""
    import pytest

    # A plugin of another package, imported already, is warned of; warnings are errors.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    signal.alarm(SECONDS)
    os.chdir(folder)
    log = os.open("log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path.insert(0, str(folder))
    # What the parent imported was the package and the harness as they are.
    for name in [name for name in sys.modules if name.split(".")[0] in (PACKAGE, TESTS)]:
        del sys.modules[name]
    paths = [str(folder / TESTS / name) for name in tests]
    status = pytest.main(
        ["-x", "-q", "--rootdir", str(folder), "-p", "no:cacheprovider", "-k", guards, *paths]
    )
    sys.stdout.flush()
    os._exit(int(status))


def verdict(wait_status: int, mutant: Mutant, log: str) -> bool:
    """Return whether the tests noticed: a failure, or a run that hung."""
    if os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGALRM:
        return True
    status = os.waitstatus_to_exitcode(wait_status)
    if status not in (0, 1):
        raise BrokenRun(
            f"mutant {mutant.name!r}: pytest ended with {status} for -k "
            f"{mutant.guards!r}.\n{log[-3000:]}"
        )
    return status == 1


def run(mutants: Sequence[Mutant], jobs: int, folder: Path) -> list[Mutant]:
    """Test the mutants, ``jobs`` at a time, and print each verdict; returns those that survived."""
    survivors: list[Mutant] = []
    waiting, running, done = list(mutants), dict[int, tuple[Mutant, Path]](), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop(0)
            place = Path(tempfile.mkdtemp(dir=folder))
            running[start(mutant, mutant.guards, mutant.tests, place)] = mutant, place
        process, status = os.wait()
        mutant, place = running.pop(process)
        noticed = verdict(status, mutant, (place / "log").read_text(errors="replace"))
        shutil.rmtree(place)
        done += 1
        print(
            f"[{done:3d}/{len(mutants)}] {'killed' if noticed else 'SURVIVED':8s}  {mutant.name}",
            flush=True,
        )
        survivors += [] if noticed else [mutant]
    return survivors


def check_guards(mutants: Sequence[Mutant], folder: Path) -> None:
    """Run all guards on the package as it is; they must pass, or a failure says nothing."""
    for tests in (FILES, UNIT):
        guards = sorted({mutant.guards for mutant in mutants if set(tests) <= set(mutant.tests)})
        if not guards:
            continue
        place = Path(tempfile.mkdtemp(dir=folder))
        _, status = os.waitpid(
            start(None, " or ".join(f"({guard})" for guard in guards), tests, place), 0
        )
        if status:
            raise BrokenRun(
                f"the guards fail on the package as it is:\n{(place / 'log').read_text()[-4000:]}"
            )


def import_once() -> None:
    """Import what every fork needs and no mutant changes."""
    import importlib

    sys.path.insert(0, str(ROOT))
    importlib.import_module(f"{TESTS}.support.backend")
    for name in (
        "managers.scheduler",
        "speculative.dflash_utils",
        "speculative.draft_utils",
        "layers.attention.tbo_backend",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"sglang.srt.{name}")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="scripts/mutants", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--jobs", type=int, default=2, help="mutants to test at a time (default: %(default)s)"
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only mutants whose name contains one of these"
    )
    options = parser.parse_args()
    mutants = selected(options.names)
    began = time.monotonic()
    import_once()
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            check_guards(mutants, Path(folder))
            print(
                f"the guards pass on the package as it is ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            survivors = run(mutants, options.jobs, Path(folder))
    except BrokenRun as error:
        print(f"scripts/mutants cannot run: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(mutants) - len(survivors)} of {len(mutants)} mutants killed in "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
