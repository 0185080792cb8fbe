"""A run of `fastattn train`: from the settings in a TOML file to a trained model in a folder."""
