"""An import-only stand-in: transformers and SGLang import it on the way to a text model."""

__version__ = "0.0.0"
