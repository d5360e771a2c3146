"""The version, apart from the rest so that building the package imports nothing."""

__version__ = "0.2.0"
