"""What the tools that serve a model and evaluate it with programs of others share."""
