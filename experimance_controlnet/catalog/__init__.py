"""What exists, and how it gets onto this disk."""
