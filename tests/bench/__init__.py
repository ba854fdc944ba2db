"""Comparisons with the peers, and the endurance tests that take minutes: see compare.sh."""
