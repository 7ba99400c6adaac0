"""The measuring: rows and settings, the harness, what is counted, the machine, rooflines and predictions."""
