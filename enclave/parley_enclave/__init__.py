"""What runs in the measured image: decides what is released."""
