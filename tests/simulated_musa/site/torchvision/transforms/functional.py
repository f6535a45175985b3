"""Functions on images, which nothing here calls."""

from torchvision.transforms import InterpolationMode

__all__ = ["InterpolationMode", "pil_to_tensor"]


def pil_to_tensor(*_: object) -> object:
    """Turn an image into a tensor."""
    raise NotImplementedError("this torchvision is a stand-in without transforms")
