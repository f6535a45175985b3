"""Rows of how SGLang loads this package, and where ``fa3`` is registered."""

from __future__ import annotations

from sglang_musa_ext.upstream.requirement import Requirement

_PLUGINS = "sglang.srt.plugins"
REGISTRY = "sglang.srt.layers.attention.attention_registry"
"""The module of upstream's attention registry."""
_UNTIL_A_PLATFORM_NAMES_IT = "Upstream lets a platform name its attention backend class."

PLUGIN_SUPPORT = Requirement(
    "function",
    _PLUGINS,
    "load_plugins",
    used_by="plugin",
    why="Without a plugin loader SGLang never calls this package.",
    remove_when="Never: it is how this package is loaded.",
)

ROWS = (
    PLUGIN_SUPPORT,
    Requirement(
        "strings",
        _PLUGINS,
        "GENERAL_PLUGINS_GROUP",
        ("sglang.srt.plugins",),
        used_by="plugin",
        why="The entry point that registers fa3 is declared in this group.",
        remove_when="Never: it is how this package is loaded.",
    ),
    Requirement(
        "strings",
        _PLUGINS,
        "PLATFORM_PLUGINS_GROUP",
        ("sglang.srt.platforms",),
        used_by="plugin",
        why="The entry point of the CPU reference platform is declared in this group.",
        remove_when="The CPU reference platform is gone.",
    ),
    Requirement(
        "module_global",
        REGISTRY,
        "ATTENTION_BACKENDS",
        used_by="plugin",
        why="The factory behind --attention-backend fa3 is replaced in this dictionary.",
        remove_when=_UNTIL_A_PLATFORM_NAMES_IT,
    ),
    Requirement(
        "registered",
        REGISTRY,
        "register_attention_backend",
        ("fa3", "fa4"),
        used_by="plugin",
        why=(
            "fa3 becomes ours and fa4 is refused; entries that upstream does not have are options "
            "nobody can choose."
        ),
        remove_when=_UNTIL_A_PLATFORM_NAMES_IT,
    ),
    *(
        Requirement(
            "function",
            "sglang.srt.utils.common",
            function,
            used_by="plugin",
            why=why,
            remove_when=(
                "Upstream's platform interface says the same without importing a device's library."
            ),
        )
        for function, why in (
            ("is_musa", "It decides whether there is anything to do under SGLANG_MUSA_EXT=auto."),
            ("get_device_capability", "A device below MP 3.1 is refused by what it returns."),
        )
    ),
)
