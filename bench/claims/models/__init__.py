"""Models of the claims, one file each."""
