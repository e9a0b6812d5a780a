"""What a background model may do: words that it may tell, and a small table of tools, each with the values that it takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

from device.config import TextConfig

# Text that tells the model how to behave: a background model tells what to say, and nothing else.
INSTRUCTIONS = frozenset(("count", "show", "quiet", "talk", "tell", "last", "ask"))
TELL, SORRY, ASK = "tell", "sorry", "ask"

LONGEST_TIMER_S = 3600.0
_ARGUMENT_CHARACTERS = 1000  # of a call; the longest valid one has 50
_WORD_CHARACTERS = 32
_SHOWN_WORDS = 8  # of refused ones, in the log


class Refused(Exception):
    """A tool call that is not carried out; the text says why, to the background model and to the log."""


class Order(NamedTuple):
    """Something for the loop to do, `after_s` from when it gets to know: text for the model, or an act of the body."""

    kind: Literal["text", "act"]
    value: str  # the word to tell, or the act
    after_s: float = 0.0


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    options: tuple[str, ...]

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.options)}

    def allows(self, value: object) -> bool:
        return isinstance(value, str) and value in self.options


@dataclass(frozen=True)
class Seconds:
    """A length of time."""

    low: float
    high: float

    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.low, "maximum": self.high}

    def allows(self, value: object) -> bool:
        return type(value) in (int, float) and self.low <= value <= self.high  # type: ignore[operator] # bool is an int, but no number


@dataclass(frozen=True)
class Tool:
    """One row of the table. `order` makes of valid arguments what the loop is to do; None: it only asks for the state."""

    description: str
    takes: Mapping[str, Choice | Seconds]
    order: Callable[[dict[str, Any]], Order] | None


def tool_table(text: TextConfig) -> dict[str, Tool]:
    """The tools by name, with what this vocabulary has to offer."""
    tellable = Choice(tellable_words(text))

    def acts(stem: str) -> Choice:
        return Choice(tuple(act.removeprefix(f"{stem}_") for act in text.acts if act.startswith(f"{stem}_")))

    table = {
        "set_timer": Tool(
            "When the time is over, the companion says the word.",
            {"seconds": Seconds(0.2, LONGEST_TIMER_S), "word": tellable},
            lambda a: Order("text", a["word"], float(a["seconds"])),
        ),
        "say": Tool("The companion says the word when it is a good moment.", {"word": tellable}, lambda a: Order("text", a["word"])),
        "look": Tool("The body looks there.", {"direction": acts("look")}, lambda a: Order("act", f"look_{a['direction']}")),
        "light": Tool("Switches the body's light.", {"state": acts("light")}, lambda a: Order("act", f"light_{a['state']}")),
        "status": Tool("How the companion's loop is doing.", {}, None),
    }
    return {name: tool for name, tool in table.items() if all(field != Choice(()) for field in tool.takes.values())}


def tellable_words(text: TextConfig) -> tuple[str, ...]:
    return tuple(word for word in text.words if word and word not in INSTRUCTIONS)


def schemas(table: Mapping[str, Tool]) -> list[dict[str, Any]]:
    """The table as chat completions want it."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": tool.description,
                "parameters": {
                    "type": "object",
                    "properties": {field: values.schema() for field, values in tool.takes.items()},
                    "required": list(tool.takes),
                    "additionalProperties": False,
                },
            },
        }
        for name, tool in table.items()
    ]


def order_of(table: Mapping[str, Tool], name: str, arguments: str) -> Order | None:
    """What a call asks for, None for the state; raises Refused."""
    tool = table.get(name)
    if tool is None:
        raise Refused(f"unknown tool; there are {', '.join(table)}")
    values = _parse(arguments)
    unknown, missing = sorted(values.keys() - tool.takes.keys()), sorted(tool.takes.keys() - values.keys())
    if unknown or missing:
        raise Refused(f"takes just {', '.join(tool.takes) or 'nothing'}")
    for field, wanted in tool.takes.items():
        if not wanted.allows(values[field]):
            raise Refused(f"'{field}' must be {json.dumps(wanted.schema())}")
    return None if tool.order is None else tool.order(values)


def _parse(arguments: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    if len(arguments) > _ARGUMENT_CHARACTERS:
        raise Refused("the arguments are too long")
    try:
        values = json.loads(arguments or "{}", parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused("the arguments are not JSON") from error
    if not isinstance(values, dict):
        raise Refused("the arguments are not a JSON object")
    return values


class Dictation:
    """An answer's text, as it streams in: `tell WORD`, again and again. Everything else is refused and counted."""

    def __init__(self, words: tuple[str, ...], most: int) -> None:
        self._words, self._most = frozenset(words), most
        self._begun = ""  # a word that may not be whole yet
        self._tell = False
        self.told = 0
        self.refused, self.examples = 0, list[str]()

    def feed(self, piece: str) -> Iterator[str]:
        """The words to tell that are whole with this piece."""
        *whole, self._begun = re.split(r"[^\w-]+", self._begun + piece)
        if len(self._begun) > _WORD_CHARACTERS:
            whole, self._begun = [*whole, self._begun], ""
        for word in whole:
            yield from self._take(word.lower())

    def end(self) -> Iterator[str]:
        """The answer is over."""
        last, self._begun = self._begun, ""
        yield from self._take(last.lower())

    def _take(self, word: str) -> Iterator[str]:
        if not word:
            return
        if word == TELL:
            self._tell = True
        elif self._tell and word in self._words and self.told < self._most:
            self._tell = False
            self.told += 1
            yield word
        else:
            self._tell = False
            self.refused += 1
            if len(self.examples) < _SHOWN_WORDS:
                self.examples.append(word[:_WORD_CHARACTERS])
