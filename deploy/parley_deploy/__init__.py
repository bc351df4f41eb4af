"""Local stack, NSM simulator and image builder. May import every role; no role imports it."""
