"""Parley: compute together over data that nobody shows to anybody."""
