"""One module for each command: it parses the options and calls the library."""
