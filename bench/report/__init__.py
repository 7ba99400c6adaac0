"""What a run leaves: tables, files, plots, pages, claims."""
