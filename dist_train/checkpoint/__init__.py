"""Room 1: what is on disk and how it gets there. Knows nothing of loops, health or clusters."""
