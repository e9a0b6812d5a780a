"""Which motion of the body an act of the model is."""

from __future__ import annotations

# Control token → motion of the dictionary; None: nothing moves.
ACTS: dict[str, str | None] = {
    "nod": "NOD",
    "shake": "SHAKE",
    "look_up": "LOOK_UP",
    "look_down": "LOOK_DOWN",
    "look_left": "LOOK_LEFT",
    "look_right": "LOOK_RIGHT",
    "light_on": "LIGHT_ON",
    "light_off": "LIGHT_OFF",
    "yield": None,  # falls silent
    "ask": None,  # asks for more thought
}
# What the host shows by itself.
SIGNALS: dict[str, str | None] = {"alert": "ALERT"}  # the board went back to the release before
MOTION_OF = {**ACTS, **SIGNALS}
