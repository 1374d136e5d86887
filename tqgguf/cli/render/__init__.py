"""Output of the commands: tables, progress bars, pictures, pages."""
