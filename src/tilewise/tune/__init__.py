"""Profiles on the machine at hand: times of configurations, the model fitted to them, its file."""
