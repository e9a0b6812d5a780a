"""The base of what can be wrong with a bundle, for the modules that check one; and how a program says what is wrong."""

from __future__ import annotations

import os
import sys


class BundleError(ValueError):
    """A directory that cannot be run as a bundle; the text ends with the remedy."""


def complain(text: str) -> None:
    """A line on standard error; under systemd the journal shows it as an error (<3>: sd-daemon(3))."""
    print(f"{'<3>' if 'JOURNAL_STREAM' in os.environ else ''}{text}", file=sys.stderr)
