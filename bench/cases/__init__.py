"""One file a suite: its cases, and the tables and headline made of their rows."""
