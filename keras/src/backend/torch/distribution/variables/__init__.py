"""Variables: how they are stored, and what they are to a program."""
