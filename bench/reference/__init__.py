"""What we compare with: the plain way to write the same thing."""
