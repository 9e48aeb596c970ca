"""ALBEF in plain PyTorch: the model, its three objectives, its teacher; neither ray nor mlflow.

Axes in every shape of this package: B pairs in the batch, K keys, Q queue slots, D joint feature,
W hidden width, L tokens (1 + P patches, or caption length), V vocabulary, H heads, N masked tokens,
M rows that ITM matches (3B).
"""
