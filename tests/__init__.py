"""Laws, hand-computed values and recorded numbers; the folders mirror the three packages."""
