"""What commands print: tables, bars, plots, pages."""
