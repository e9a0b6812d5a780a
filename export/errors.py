"""What a user of `copresence-export` can mend: every such error is a single line that ends with the remedy."""

from __future__ import annotations


class ExportError(Exception):
    """Base of the errors that the command line reports as one line instead of a traceback."""
