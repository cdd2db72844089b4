"""One file per verb, named after it: what it asks, what it prints, and the call of the library."""
