"""How a global batch is dealt to workers: in order, in shares that differ by one pair at most."""


def share_of(rank: int, world_size: int, num_pairs: int) -> range:
    """Give the places in the global batch that one worker holds."""
    return range(rank * num_pairs // world_size, (rank + 1) * num_pairs // world_size)
