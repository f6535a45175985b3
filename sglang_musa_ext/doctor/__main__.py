"""Run the doctor: ``python -m sglang_musa_ext.doctor``."""

import sys

from sglang_musa_ext.doctor import main

sys.exit(main())
