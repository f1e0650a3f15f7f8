"""Loops in C++ for a CPU."""
