"""Plugs for other libraries. Each module imports its host when used, never before."""
