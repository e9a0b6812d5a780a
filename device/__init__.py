"""What runs on the board: one engine launch every tick, headless, from boot."""
