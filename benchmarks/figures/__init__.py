"""The figures, one script each; the others are what they share."""
