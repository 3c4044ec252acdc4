"""Room 2: noticing trouble, and the end of the time that is given. It never touches checkpoints."""
