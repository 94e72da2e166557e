"""Ready-made tasks and models to train candidates on."""
