"""How packets meet: one exchange a file."""
