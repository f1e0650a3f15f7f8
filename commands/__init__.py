"""The modes of main.py, a file each."""
