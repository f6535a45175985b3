"""Moore Threads (MUSA) FA3 attention for SGLang, composed from upstream's own backend.

Importing this package loads neither torch nor sglang; the work starts in
:mod:`sglang_musa_ext.plugin`, which SGLang finds through its entry points.
"""

__version__ = "0.2.0"
