"""How the companion comes up by itself and stays up: systemd's units, and the slots that a release is tried, kept or given up in."""
