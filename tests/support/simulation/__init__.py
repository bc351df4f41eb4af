"""Randomised fault simulation: sessions of real processes over wires that lose, hold and repeat what they are told to.

A seed gives a plan (`plan`), a plan is played in a theatre of real coordinators, enclaves and members (`theatre`, `node`,
`actor`, `calls`, `link`), and after every step the promises of DESIGN 2 and 5 are checked (`invariants`).
`python -m support.simulation` plays as many seeds as fit into a time.
"""
