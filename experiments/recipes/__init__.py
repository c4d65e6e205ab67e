"""Compositions of jaxrnn's functions, each one short file to read and to copy from."""
