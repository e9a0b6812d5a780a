"""Stands for the screens' library of a Raspberry Pi, which picamera2 imports and nothing here draws with."""

from typing import Any


class _Anything:
    """Has every attribute."""

    def __getattr__(self, name: str) -> Any:
        return name


PixelFormat = _Anything()
