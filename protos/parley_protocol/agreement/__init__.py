"""The agreement: its model, its canonical form, its expressions, its signatures."""
