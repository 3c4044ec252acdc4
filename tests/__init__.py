"""A regular package, so that another distribution's top-level `tests` cannot shadow `tests.support`."""
