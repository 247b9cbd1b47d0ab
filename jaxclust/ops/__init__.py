"""Pure functions on arrays; nothing here knows of files, models or the command line."""
