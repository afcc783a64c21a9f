"""What is trained: data, models, optimizers, and the training itself."""
