"""Pooling: the softmax over tokens of each token's scores, and the mean of the tokens that it weighs."""
