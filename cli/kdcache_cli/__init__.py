"""The command line: one file per verb group, no logic of its own."""
