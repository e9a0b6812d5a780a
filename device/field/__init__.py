"""The companion in the field: its settings, what it tells the journal, and what a field engineer asks it."""
