"""Names of resampling methods."""

import enum


class InterpolationMode(enum.Enum):
    """Resampling methods; transformers makes a table of them at import."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"
