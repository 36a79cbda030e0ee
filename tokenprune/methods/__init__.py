"""One short file per paper; each registers a factory whose keyword arguments are the method's own options."""
