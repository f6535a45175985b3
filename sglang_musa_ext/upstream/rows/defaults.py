"""Rows of what SGLang chooses on MUSA where nobody did: attention backend and page size."""

from __future__ import annotations

from sglang_musa_ext.upstream.requirement import Requirement
from sglang_musa_ext.upstream.rows.plugin import REGISTRY

_USER = "musa_defaults"
_SERVER_ARGS = "sglang.srt.server_args"
_NAMES_THE_BACKEND = (
    "It names the attention backend where none was chosen; fa3 is put in its place on MUSA."
)
_UNTIL_UPSTREAM_CHOOSES_IT = "Upstream chooses fa3 on MUSA by itself."
_UNTIL_0_5_19 = "The oldest supported release is 0.5.19 or newer."
_UNTIL_PLUGINS_COME_FIRST = (
    "Upstream loads plugins before it settles arguments, in every way of starting a server."
)
_PLUGINS_TOO_LATE = "sgl-project/sglang#38464"
_TRITON_FOR_E5M2 = "It takes triton in place of a named fa3, and one line of the log says so."
_UNTIL_E5M2 = "Upstream serves fp8_e5m2 with fa3."
_PAGE_SIZE = "It gives an unset page size its default, 64 on MUSA."

ROWS = (
    Requirement(
        "method",
        _SERVER_ARGS,
        "ServerArgs._get_default_attn_backend",
        ("self", "use_mla_backend", "model_config"),
        None,
        "0.5.18",
        used_by=_USER,
        why=_NAMES_THE_BACKEND,
        remove_when=_UNTIL_0_5_19,
    ),
    Requirement(
        "function",
        "sglang.srt.arg_groups.model_override_base",
        "get_default_attn_backend",
        ("server_args", "use_mla_backend", "model_config"),
        "0.5.19",
        used_by=_USER,
        why=_NAMES_THE_BACKEND,
        remove_when=_UNTIL_UPSTREAM_CHOOSES_IT,
    ),
    Requirement(
        "module_global",
        "sglang.srt.arg_groups.overrides",
        "get_default_attn_backend",
        (),
        "0.5.19",
        used_by=_USER,
        why=_NAMES_THE_BACKEND,
        remove_when=_UNTIL_UPSTREAM_CHOOSES_IT,
    ),
    Requirement(
        "method",
        _SERVER_ARGS,
        "ServerArgs._handle_model_specific_adjustments",
        ("self",),
        None,
        "0.5.18",
        used_by=_USER,
        why="Up to 0.5.14 it puts some models on triton, in the arguments; those may get fa3.",
        remove_when=_UNTIL_0_5_19,
    ),
    *(
        Requirement(
            "method",
            _SERVER_ARGS,
            f"ServerArgs.{method}",
            ("self",),
            None,
            "0.5.18",
            used_by=_USER,
            why="It says what the model is, where the model has been put on triton.",
            remove_when=_UNTIL_0_5_19,
        )
        for method in ("get_model_config", "use_mla_backend")
    ),
    Requirement(
        "function",
        "sglang.srt.arg_groups.overrides",
        "collect_model_override_declarations",
        ("architecture", "server_args", "hf_config"),
        "0.5.15",
        used_by=_USER,
        why="It returns what models declare, triton for some of them; those may get fa3.",
        remove_when=_UNTIL_UPSTREAM_CHOOSES_IT,
    ),
    Requirement(
        "module_global",
        "sglang.srt.arg_groups.model_hook",
        "collect_model_override_declarations",
        (),
        "0.5.19",
        used_by=_USER,
        why="What models declare is collected through this name.",
        remove_when=_UNTIL_UPSTREAM_CHOOSES_IT,
    ),
    *(
        Requirement(
            "function",
            "sglang.srt.arg_groups.model_override_base",
            function,
            ("server_args",),
            "0.5.19",
            used_by=_USER,
            why="It says what the model is, where the model has been put on triton.",
            remove_when=_UNTIL_UPSTREAM_CHOOSES_IT,
        )
        for function in ("model_config_of", "use_mla_backend")
    ),
    Requirement(
        "method",
        _SERVER_ARGS,
        "ServerArgs.__post_init__",
        ("self",),
        None,
        "0.5.19",
        used_by=_USER,
        why=(
            "Up to 0.5.18 arguments are settled here; those settled with this package in place are "
            "marked."
        ),
        remove_when=_UNTIL_0_5_19,
        fault=_PLUGINS_TOO_LATE,
    ),
    Requirement(
        "calls",
        "sglang.srt.entrypoints.engine",
        "Engine._launch_subprocesses",
        ("server_args.resolve_once",),
        "0.5.19",
        used_by=_USER,
        why=(
            "Arguments are settled by this method, once; those settled with this package in place "
            "are marked."
        ),
        remove_when=_UNTIL_PLUGINS_COME_FIRST,
        fault=_PLUGINS_TOO_LATE,
    ),
    Requirement(
        "registered",
        REGISTRY,
        "register_attention_backend",
        ("triton", "flashinfer"),
        used_by=_USER,
        why=(
            "These are upstream's own choices on MUSA; building one says if it was chosen before "
            "this package could."
        ),
        remove_when=_UNTIL_PLUGINS_COME_FIRST,
        fault=_PLUGINS_TOO_LATE,
    ),
    Requirement(
        "strings",
        "sglang.srt.platforms",
        "__getattr__",
        ("current_platform",),
        used_by=_USER,
        why=(
            "The platform in use is looked up under this name, which the module makes up when "
            "asked."
        ),
        remove_when=_UNTIL_UPSTREAM_CHOOSES_IT,
    ),
    Requirement(
        "method",
        "sglang.srt.platforms.device_mixin",
        "DeviceMixin.is_out_of_tree",
        ("self",),
        used_by=_USER,
        why="A platform plugin names its own default attention backend, which is left to it.",
        remove_when=_UNTIL_UPSTREAM_CHOOSES_IT,
    ),
    Requirement(
        "strings",
        _SERVER_ARGS,
        "ServerArgs._handle_attention_backend_compatibility",
        ("fa3", "fp8_e5m2", "triton"),
        None,
        "0.5.14",
        used_by=_USER,
        why=_TRITON_FOR_E5M2,
        remove_when=_UNTIL_E5M2,
    ),
    Requirement(
        "strings",
        "sglang.srt.arg_groups.overrides",
        "_attention_backend_fa3_fp8_fallback",
        ("fa3", "fp8_e5m2", "triton"),
        "0.5.15",
        used_by=_USER,
        why=_TRITON_FOR_E5M2,
        remove_when=_UNTIL_E5M2,
    ),
    Requirement(
        "method",
        _SERVER_ARGS,
        "ServerArgs._handle_page_size",
        ("self",),
        None,
        "0.5.18",
        used_by=_USER,
        why=_PAGE_SIZE,
        remove_when=_UNTIL_0_5_19,
    ),
    Requirement(
        "function",
        "sglang.srt.arg_groups.overrides",
        "_page_size_default",
        ("view",),
        "0.5.15",
        used_by=_USER,
        why=_PAGE_SIZE,
        remove_when="Upstream asks the platform for the default page size.",
    ),
)
