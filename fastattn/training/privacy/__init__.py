"""Private training data: noise in training, personal data out of texts, attacks to measure both."""
