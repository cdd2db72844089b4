"""One file per verb, named after it: its flags, the call of the library, what is printed."""
