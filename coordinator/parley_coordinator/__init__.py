"""The relay on the parent instance: stores and forwards, decides nothing."""
