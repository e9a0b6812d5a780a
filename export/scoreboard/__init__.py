"""The scoreboard: the companion and other kinds of system, played closed loop on the same scenes, and judged by what came out."""
