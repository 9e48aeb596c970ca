"""What a pre-trained model is used for: one file a task, with its head, loss and prediction."""
