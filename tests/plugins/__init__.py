"""Parts of someone else, from a file."""
