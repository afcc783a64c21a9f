"""What the commands leave behind: tables, files, figures, provenance."""
