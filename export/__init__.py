"""What runs on a workstation: checkpoint in, proven bundle out."""
