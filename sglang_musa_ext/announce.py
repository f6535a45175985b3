"""Lines that an operator is meant to see, before SGLang has set its log up too."""

from __future__ import annotations

import logging
import sys
import time


def announce(logger: logging.Logger, line: str) -> None:
    """Log ``line``, or print it where the log's level would drop it.

    SGLang loads plugins and settles arguments before it sets its log's level: Python's until then.
    """
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", line)
    else:
        print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}", file=sys.stderr, flush=True)
