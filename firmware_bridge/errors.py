"""What can be wrong with the bridge, typed by remedy."""

from __future__ import annotations


class BridgeError(Exception):
    """The bridge cannot work; the text ends with the remedy."""


class NoAnswer(BridgeError):
    """Nobody answers on the port. Remedy: cable, power, port, firmware."""

    def __init__(self, port: str) -> None:
        super().__init__(
            f"nobody answers on {port}; in this order: is the board powered, is it the right port, are both data wires and ground "
            "connected (out to in, in to out), does it run this firmware (make flash-mcu)?"
        )


class BadLine(BridgeError):
    """Answers come, but hardly one in the first place. Remedy: ground, cable, baud rate."""


class WrongDictionary(BridgeError):
    """Host and firmware do not speak the same dictionary. Remedy: flash the side that the text names."""


class LinkLost(Exception):
    """What was there is gone; the bridge connects again."""
