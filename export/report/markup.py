"""HTML that cannot be broken out of: whatever is not markup is escaped where it is put in."""

from __future__ import annotations

import html


class Markup(str):
    """Text that is HTML already. Only this module makes it, and only from what it has escaped or what our own code wrote."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """`<name attributes>children</name>`; `class_` is class, any other `_` a hyphen; one that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items() if value is not None
    )
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """All of them one after another, escaped where they are not markup."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def escape(text: str) -> Markup:
    """Text as it is to be read; what cannot be seen (controls, marks that turn the direction of writing, half a character) shows as �."""
    return Markup(html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)))


def table(heads: list[str], rows: list[list[str]], words: int = 1) -> Markup:
    """A table in a box that scrolls by itself on a narrow screen; the first `words` columns are text, the others numbers."""

    def cells(name: str, row: list[str]) -> Markup:
        return join(*(element(name, cell, class_=None if i < words else "number") for i, cell in enumerate(row)))

    head = element("thead", element("tr", cells("th", heads)))
    body = element("tbody", *(element("tr", cells("td", row)) for row in rows))
    return element("div", element("table", head, body), class_="scroll", tabindex="0")
