"""Decoders, which nothing here calls."""

ImageReadMode = object


def decode_image(*_: object) -> object:
    """Decode an image."""
    raise NotImplementedError("this torchvision is a stand-in without decoders")


decode_jpeg = decode_image
