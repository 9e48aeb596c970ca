"""The classes of tasks; a place is the number in the official checkpoints. Imports nothing."""

ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")
"""As `dataset/ve_dataset.py` of the published code counts them."""
NLVR2_LABELS = ("false", "true")
"""As `dataset/nlvr_dataset.py` of the published code counts them."""
LABELS = {"entailment": ENTAILMENT_LABELS, "nlvr2": NLVR2_LABELS}
