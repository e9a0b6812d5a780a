"""What became of frames, commands and acts, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LinkHealth:
    """What became of frames and commands, from the start on."""

    sent: int = 0
    resent: int = 0
    timeouts: int = 0
    refusals: int = 0  # the microcontroller said that a frame was not the next one
    dropped: int = 0  # commands that found the queue full or nobody there
    bad_bytes: int = 0
    crc_errors: int = 0
    unreadable: int = 0
    connects: int = 0
    acts_started: int = 0
    acts_failed: int = 0  # with a reason that the microcontroller gave
    acts_lost: int = 0  # nobody can say what became of them

    @property
    def in_vain(self) -> int:
        """Acts that did not move anything, and commands that nobody could take."""
        return self.dropped + self.acts_failed + self.acts_lost
