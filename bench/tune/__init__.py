"""Searches that are run by hand on a GPU."""
