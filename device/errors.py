"""The base of what can be wrong with a bundle, for the modules that check one."""

from __future__ import annotations


class BundleError(ValueError):
    """A directory that cannot be run as a bundle; the text ends with the remedy."""
