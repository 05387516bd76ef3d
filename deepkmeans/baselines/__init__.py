"""What the paper compares itself with, and what came after it: a module for each family of methods."""
