"""One file per host family: the only code that knows a library. An adapter knows no method."""
