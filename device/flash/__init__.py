"""How a release gets onto a board: the playbook, the tool that installs it there, and the first image of a board."""
