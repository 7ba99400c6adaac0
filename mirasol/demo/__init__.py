"""A web page on which a model watches and listens, and answers meanwhile: `python -m mirasol demo`."""
