"""Task heads on top of a feature pyramid."""
