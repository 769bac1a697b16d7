"""fourm: train any-to-any multimodal models."""

__version__ = "0.1.0"
