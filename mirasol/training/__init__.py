"""What a training run is made of: options, the model it begins with, processes, optimizer, checkpoints, logs."""
