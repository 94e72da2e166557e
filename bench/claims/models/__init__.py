"""Models of the recipes, one file each."""
