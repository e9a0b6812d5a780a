"""One page that tells what a bundle was made from, what was proven of it, and what it costs."""
