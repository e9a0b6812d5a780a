"""The host's end of the microcontroller link; stands alone."""
