"""The three losses of ALBEF, one file each, each a function that reads like its equation."""
