"""The model in training: loading, log-probabilities and loss of a batch, optimizer, ranks."""
