"""Room 3: where a training runs. Never imported by training code."""
