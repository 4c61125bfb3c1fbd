"""What every run needs, and nobody has to read first."""
