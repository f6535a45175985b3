"""Rows of what ranks read of their runner before they load weights, to compare themselves."""

from __future__ import annotations

from sglang_musa_ext.upstream.names import MODEL_RUNNER
from sglang_musa_ext.upstream.requirement import Requirement

_UNTIL_PLUGINS_AGREE = "Upstream compares the plugins of a server's ranks itself."

ROWS = (
    Requirement(
        "method",
        MODEL_RUNNER,
        "ModelRunner.load_model",
        ("self",),
        used_by="ranks",
        why="A rank has joined its process group by then, and has loaded no weights.",
        remove_when=_UNTIL_PLUGINS_AGREE,
    ),
    *(
        Requirement(
            "attribute",
            MODEL_RUNNER,
            f"ModelRunner.{name}",
            used_by="ranks",
            why=why,
            remove_when=_UNTIL_PLUGINS_AGREE,
        )
        for name, why in (
            ("is_draft_worker", "The draft model of a rank needs no agreement of its own."),
            ("device", "It decides which kernels a rank serves on."),
            ("server_args", "Page size and backend are compared; sizes say which node a rank is."),
        )
    ),
)
